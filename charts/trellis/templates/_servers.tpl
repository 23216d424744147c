{{/* Where PostgreSQL, Temporal and the partners are, and which Secrets open them. */}}

{{- define "trellis.databaseHost" -}}
{{ .Values.database.host | default (include "trellis.bundledHost" .) }}
{{- end }}

{{- define "trellis.bundledHost" -}}
{{ include "trellis.serversName" . }}-postgresql
{{- end }}

{{/* Whether Temporal of this chart keeps its data in PostgreSQL of this chart. */}}
{{- define "trellis.temporalOnBundled" -}}
{{- $host := tpl (dig "database" "host" "" .Values.temporal) . -}}
{{ has $host (list "" (include "trellis.bundledHost" .)) | ternary "yes" "" }}
{{- end }}

{{- define "trellis.temporalAddress" -}}
{{ .Values.temporalClient.address | default (printf "%s-temporal-frontend:7233" (include "trellis.serversName" .)) }}
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
{{ .Values.database.existingSecret | default (include "trellis.bundledSecret" .) }}
{{- end -}}
{{- end }}

{{/* That of the chart's PostgreSQL. */}}
{{- define "trellis.bundledSecret" -}}
{{- $own := tpl (dig "auth" "existingSecret" "" .Values.postgresql) . -}}
{{ $own | default (tpl .Values.global.trellis.postgresqlSecret .) | default (include "trellis.bundledHost" .) }}
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

{{/* Who connects to PostgreSQL, and which keys of which Secret open it. (dict "root" $ "role" "app"|"migrate") */}}
{{- define "trellis.databaseLogin" -}}
{{- $v := .root.Values -}}
{{- $own := $v.migration -}}
{{- $secret := include "trellis.migrationSecret" .root -}}
{{- $url := $own.urlKey | default (ternary "" $v.database.urlKey (or $own.existingSecret $own.password | empty | not)) -}}
{{- if eq .role "app" -}}
{{- $own = $v.database -}}
{{- $secret = include "trellis.databaseSecret" .root -}}
{{- $url = $own.urlKey -}}
{{- end -}}
{{ dict "user" $own.user "secret" $secret "passwordKey" $own.passwordKey "urlKey" $url | toJson }}
{{- end }}

{{/* Environment for PostgreSQL. The dict as above. */}}
{{- define "trellis.databaseEnv" -}}
{{- $database := .root.Values.database -}}
{{- $login := include "trellis.databaseLogin" . | fromJson -}}
- name: TRELLIS_DATABASE_URL
  {{- if $login.urlKey }}
  valueFrom: {secretKeyRef: {name: {{ $login.secret }}, key: {{ $login.urlKey }}}}
  {{- else }}
  value: postgresql://{{ $login.user | urlquery | replace "+" "%20" }}@{{ include "trellis.databaseHost" .root }}:{{ $database.port }}/{{ $database.name | urlquery | replace "+" "%20" }}?sslmode={{ include "trellis.sslMode" .root }}{{ with include "trellis.sslRootCert" .root }}&sslrootcert={{ . }}{{ end }}
# A file, which is read anew for each connection: a password that is replaced needs no new pods.
- {name: TRELLIS_DATABASE_PASSWORD_FILE, value: /etc/trellis/postgresql/password}
  {{- end }}
{{- if $login.urlKey }}
# Where the URL says nothing of it.
- {name: PGSSLMODE, value: {{ include "trellis.sslMode" .root }}}
{{- with include "trellis.sslRootCert" .root }}
- {name: PGSSLROOTCERT, value: {{ . }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "trellis.sslMode" -}}
{{ .Values.database.sslMode | default (ternary "disable" "verify-full" .Values.postgresql.enabled) }}
{{- end }}

{{/* Where a certificate is checked: by the CA that is given, else by those of the image. Neither driver has a default that is there. */}}
{{- define "trellis.sslRootCert" -}}
{{- if .Values.database.caSecret -}}
/etc/trellis/postgresql/{{ .Values.database.caKey }}
{{- else if hasPrefix "verify-" (include "trellis.sslMode" .) -}}
/etc/ssl/certs/ca-certificates.crt
{{- end -}}
{{- end }}

{{/* Names of the partners that the sandbox stands for, as a list. */}}
{{- define "trellis.sandboxed" -}}
{{- $names := list -}}
{{- with .Values.partners -}}
{{- if not .payment.url -}}{{- $names = append $names "the payment provider" -}}{{- end -}}
{{- if not .carrier.url -}}{{- $names = append $names "the carrier" -}}{{- end -}}
{{- end -}}
{{ toJson $names }}
{{- end }}

{{/* Credentials for the partners, and where they are mounted. (.Values.partners) */}}
{{- define "trellis.partnersEnv" -}}
{{- $partners := . -}}
{{- range $name := list "payment" "carrier" }}
{{- $variable := printf "TRELLIS_%s" (upper $name) }}
{{- with get $partners $name }}
{{- if .existingSecret }}
# A file, which is read anew for each call: a token that is replaced needs no new pods.
- {name: {{ $variable }}_TOKEN_FILE, value: /etc/trellis/{{ $name }}/token}
{{- end }}
{{- if .tls.caSecret }}
- {name: {{ $variable }}_TLS_CA, value: /etc/trellis/{{ $name }}/ca.crt}
{{- end }}
{{- if .tls.certSecret }}
- {name: {{ $variable }}_TLS_CERT, value: /etc/trellis/{{ $name }}/tls.crt}
- {name: {{ $variable }}_TLS_KEY, value: /etc/trellis/{{ $name }}/tls.key}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
