{{/* DNS and the database: by its labels if it is of this release, else by its port. */}}
{{- define "trellis-temporal.egress" -}}
{{ include "trellis-temporal.egressDns" . }}
- ports:
    - port: {{ .Values.database.port }}
  {{- if eq (include "trellis-temporal.databaseHost" .) (include "trellis-temporal.ownDatabaseHost" .) }}
  to:
    - podSelector:
        matchLabels:
          app.kubernetes.io/instance: {{ include "trellis.instance" . }}
          app.kubernetes.io/component: database
  {{- else if .Values.networkPolicy.databaseTo }}
  to:
    {{- toYaml .Values.networkPolicy.databaseTo | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "trellis-temporal.egressDns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
  {{- with .Values.global.networkPolicy.dnsTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
