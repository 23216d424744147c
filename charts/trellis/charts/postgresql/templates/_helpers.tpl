{{/* Release names are limited so that every name of a release, in every chart, stays within 63 characters. */}}
{{- define "postgresql.fullname" -}}
{{- if gt (len .Release.Name) 36 -}}
{{- fail (printf "release name %q has %d characters: use at most 36, since names of Services and Jobs are made from it" .Release.Name (len .Release.Name)) -}}
{{- end -}}
{{ .Release.Name }}-postgresql
{{- end }}

{{- define "postgresql.selectorLabels" -}}
app.kubernetes.io/name: postgresql
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: database
{{- end }}

{{- define "postgresql.labels" -}}
{{ include "postgresql.selectorLabels" . }}
app.kubernetes.io/part-of: trellis
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Values.image.tag | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "postgresql.secretName" -}}
{{ include "postgresql.givenSecret" . | default (include "postgresql.fullname" .) }}
{{- end }}

{{- define "postgresql.givenSecret" -}}
{{ tpl .Values.auth.existingSecret . | default (tpl .Values.global.trellis.postgresqlSecret .) }}
{{- end }}

{{- define "postgresql.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}
