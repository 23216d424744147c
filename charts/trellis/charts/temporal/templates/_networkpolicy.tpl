{{/* DNS and the database: by its labels if it is of this release, else by its port. */}}
{{- define "temporal.egress" -}}
{{ include "temporal.egressDns" . }}
- ports:
    - port: {{ .Values.database.port }}
  {{- if eq (tpl .Values.database.host .) (printf "%s-postgresql" .Release.Name) }}
  to:
    - podSelector:
        matchLabels:
          app.kubernetes.io/instance: {{ .Release.Name }}
          app.kubernetes.io/component: database
  {{- else if .Values.networkPolicy.databaseTo }}
  to:
    {{- toYaml .Values.networkPolicy.databaseTo | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "temporal.egressDns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
  {{- with .Values.global.networkPolicy.dnsTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
