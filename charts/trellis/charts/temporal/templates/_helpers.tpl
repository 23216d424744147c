{{- define "trellis-temporal.fullname" -}}
{{ include "trellis.serversName" . }}-temporal
{{- end }}

{{/* Called with (dict "root" $ "component" "…"). */}}
{{- define "trellis-temporal.selectorLabels" -}}
app.kubernetes.io/name: temporal
app.kubernetes.io/instance: {{ include "trellis.instance" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "trellis-temporal.labels" -}}
{{ include "trellis-temporal.selectorLabels" . }}
app.kubernetes.io/part-of: trellis
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Values.server.image.tag | default .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Of pods: with those that are given, which replace none. */}}
{{- define "trellis-temporal.podLabels" -}}
{{ merge (include "trellis-temporal.labels" . | fromYaml) .root.Values.podLabels | toYaml }}
{{- end }}

{{/* Called with (dict "root" $ "image" .Values.….image). */}}
{{- define "trellis-temporal.image" -}}
image: {{ include "trellis.repository" (dict "root" .root "repository" .image.repository) }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Values.server.image.tag | default .root.Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}
