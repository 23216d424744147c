{{- define "trellis-postgresql.fullname" -}}
{{ include "trellis.serversName" . }}-postgresql
{{- end }}

{{- define "trellis-postgresql.selectorLabels" -}}
app.kubernetes.io/name: postgresql
app.kubernetes.io/instance: {{ include "trellis.instance" . }}
app.kubernetes.io/component: database
{{- end }}

{{- define "trellis-postgresql.labels" -}}
{{ include "trellis-postgresql.selectorLabels" . }}
app.kubernetes.io/part-of: trellis
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Values.image.tag | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "trellis-postgresql.secretName" -}}
{{ include "trellis-postgresql.givenSecret" . | default (include "trellis-postgresql.fullname" .) }}
{{- end }}

{{- define "trellis-postgresql.givenSecret" -}}
{{ tpl .Values.auth.existingSecret . | default (tpl .Values.global.trellis.postgresqlSecret .) }}
{{- end }}

{{- define "trellis-postgresql.image" -}}
{{ include "trellis.repository" (dict "root" . "repository" .Values.image.repository) }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}
