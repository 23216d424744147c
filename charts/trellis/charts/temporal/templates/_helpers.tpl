{{/* Release names are limited so that every name of a release, in every chart, stays within 63 characters. */}}
{{- define "temporal.fullname" -}}
{{- if gt (len .Release.Name) 36 -}}
{{- fail (printf "release name %q has %d characters: use at most 36, since names of Services and Jobs are made from it" .Release.Name (len .Release.Name)) -}}
{{- end -}}
{{ .Release.Name }}-temporal
{{- end }}

{{/* Called with (dict "root" $ "component" "…"). */}}
{{- define "temporal.selectorLabels" -}}
app.kubernetes.io/name: temporal
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "temporal.labels" -}}
{{ include "temporal.selectorLabels" . }}
app.kubernetes.io/part-of: trellis
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Values.server.image.tag | default .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Called with (dict "root" $ "image" .Values.….image). */}}
{{- define "temporal.image" -}}
image: {{ .image.repository }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Values.server.image.tag | default .root.Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}
