{{/* That of the PostgreSQL which the same chart brings, and the one in use. */}}
{{- define "trellis-temporal.ownDatabaseHost" -}}
{{ include "trellis.serversName" . }}-postgresql
{{- end }}

{{- define "trellis-temporal.databaseHost" -}}
{{ tpl .Values.database.host . | default (include "trellis-temporal.ownDatabaseHost" .) }}
{{- end }}

{{/* The server's way to its databases: variables of its built-in configuration template. */}}
{{- define "trellis-temporal.serverDatabaseEnv" -}}
{{- $db := .Values.database -}}
- {name: DB, value: {{ $db.plugin }}}
- {name: POSTGRES_SEEDS, value: {{ include "trellis-temporal.databaseHost" . | quote }}}
- {name: DB_PORT, value: {{ $db.port | quote }}}
- {name: POSTGRES_USER, value: {{ $db.user | quote }}}
- name: POSTGRES_PWD
  valueFrom: {secretKeyRef: {name: {{ include "trellis-temporal.databaseSecret" . }}, key: {{ $db.existingSecretKey }}}}
- {name: DBNAME, value: {{ $db.name | quote }}}
- {name: VISIBILITY_DBNAME, value: {{ $db.visibilityName | quote }}}
- {name: SQL_MAX_CONNS, value: {{ $db.maxConnections | quote }}}
- {name: SQL_MAX_IDLE_CONNS, value: {{ $db.maxConnections | quote }}}
- {name: SQL_VIS_MAX_CONNS, value: {{ $db.visibilityMaxConnections | quote }}}
- {name: SQL_VIS_MAX_IDLE_CONNS, value: {{ $db.visibilityMaxConnections | quote }}}
{{- if $db.tls.enabled }}
- {name: SQL_TLS_ENABLED, value: "true"}
- {name: SQL_HOST_VERIFICATION, value: {{ $db.tls.verify | quote }}}
{{- if $db.tls.caSecret }}
- {name: SQL_CA, value: /etc/temporal-database-ca/ca.crt}
{{- end }}
{{- if $db.tls.certSecret }}
- {name: SQL_CERT, value: /etc/temporal-database-cert/tls.crt}
- {name: SQL_CERT_KEY, value: /etc/temporal-database-cert/tls.key}
{{- end }}
{{- end }}
{{- end }}

{{/* The same for temporal-sql-tool, which has names of its own, and the scripts around it. */}}
{{- define "trellis-temporal.toolEnv" -}}
{{- $db := .Values.database -}}
- {name: SQL_PLUGIN, value: {{ $db.plugin }}}
- {name: SQL_HOST, value: {{ include "trellis-temporal.databaseHost" . | quote }}}
- {name: SQL_PORT, value: {{ $db.port | quote }}}
- {name: SQL_USER, value: {{ $db.user | quote }}}
- name: SQL_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "trellis-temporal.databaseSecret" . }}, key: {{ $db.existingSecretKey }}}}
- {name: DATABASE, value: {{ $db.name | quote }}}
- {name: VISIBILITY_DATABASE, value: {{ $db.visibilityName | quote }}}
{{- if $db.tls.enabled }}
- {name: SQL_TLS, value: "true"}
- {name: SQL_TLS_DISABLE_HOST_VERIFICATION, value: {{ not $db.tls.verify | quote }}}
{{- if $db.tls.caSecret }}
- {name: SQL_TLS_CA_FILE, value: /etc/temporal-database-ca/ca.crt}
{{- end }}
{{- if $db.tls.certSecret }}
- {name: SQL_TLS_CERT_FILE, value: /etc/temporal-database-cert/tls.crt}
- {name: SQL_TLS_KEY_FILE, value: /etc/temporal-database-cert/tls.key}
{{- end }}
{{- end }}
{{- end }}

{{- define "trellis-temporal.databaseMounts" -}}
{{- with .Values.database.tls }}
{{- if and .enabled .caSecret }}
- {name: database-ca, mountPath: /etc/temporal-database-ca, readOnly: true}
{{- end }}
{{- if and .enabled .certSecret }}
- {name: database-cert, mountPath: /etc/temporal-database-cert, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "trellis-temporal.databaseVolumes" -}}
{{- with .Values.database.tls }}
{{- if and .enabled .caSecret }}
- name: database-ca
  secret: {secretName: {{ .caSecret }}, defaultMode: 0440, items: [{key: {{ .caKey }}, path: ca.crt}]}
{{- end }}
{{- if and .enabled .certSecret }}
- name: database-cert
  secret: {secretName: {{ .certSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}

{{/* One of its own, or that of the release's PostgreSQL. */}}
{{- define "trellis-temporal.databaseSecret" -}}
{{- $release := tpl .Values.global.trellis.postgresqlSecret . | default (include "trellis-temporal.ownDatabaseHost" .) -}}
{{ tpl .Values.database.existingSecret . | default $release }}
{{- end }}
