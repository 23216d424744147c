{{/* Where PostgreSQL and Temporal are, and which Secrets open them. */}}

{{- define "trellis.databaseHost" -}}
{{ .Values.database.host | default (printf "%s-postgresql" .Release.Name) }}
{{- end }}

{{- define "trellis.temporalAddress" -}}
{{ .Values.temporalClient.address | default (printf "%s-temporal-frontend:7233" .Release.Name) }}
{{- end }}

{{- define "trellis.temporalTls" -}}
{{- with .Values.temporalClient -}}
{{ or .tls.enabled .tls.caSecret .tls.certSecret .apiKey.value .apiKey.existingSecret | empty | not }}
{{- end -}}
{{- end }}

{{- define "trellis.databaseSecret" -}}
{{- if .Values.database.password -}}
{{ include "trellis.fullname" . }}-database
{{- else -}}
{{ .Values.database.existingSecret | default (printf "%s-postgresql" .Release.Name) }}
{{- end -}}
{{- end }}

{{- define "trellis.migrationSecret" -}}
{{- if .Values.migration.password -}}
{{ include "trellis.fullname" . }}-database
{{- else -}}
{{ .Values.migration.existingSecret | default (include "trellis.databaseSecret" .) }}
{{- end -}}
{{- end }}

{{- define "trellis.apiKeySecret" -}}
{{- with .Values.temporalClient.apiKey -}}
{{ ternary (printf "%s-temporal" (include "trellis.fullname" $)) .existingSecret (ne .value "") }}
{{- end -}}
{{- end }}

{{/* Environment for PostgreSQL. (dict "root" $ "role" "app"|"migrate") */}}
{{- define "trellis.databaseEnv" -}}
{{- $v := .root.Values -}}
{{- $own := $v.migration -}}
{{- $secret := include "trellis.migrationSecret" .root -}}
{{- $url := $own.urlKey | default (ternary "" $v.database.urlKey (or $own.existingSecret $own.password | empty | not)) -}}
{{- if eq .role "app" -}}
{{- $own = $v.database -}}
{{- $secret = include "trellis.databaseSecret" .root -}}
{{- $url = $own.urlKey -}}
{{- end -}}
{{- $database := $v.database -}}
- name: TRELLIS_DATABASE_URL
  {{- if $url }}
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ $url }}}}
  {{- else }}
  value: postgresql://{{ $own.user | urlquery | replace "+" "%20" }}@{{ include "trellis.databaseHost" .root }}:{{ $database.port }}/{{ $database.name | urlquery | replace "+" "%20" }}
# Not in the URL, where a password would have to be escaped; asyncpg and libpq read these.
- name: PGPASSWORD
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ $own.passwordKey }}}}
  {{- end }}
{{- with $database.sslMode | default (ternary "verify-full" "" (ne $database.caSecret "")) }}
- {name: PGSSLMODE, value: {{ . }}}
{{- end }}
{{- if $database.caSecret }}
- {name: PGSSLROOTCERT, value: /etc/trellis/postgresql/{{ $database.caKey }}}
{{- end }}
{{- end }}
