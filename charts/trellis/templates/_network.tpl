{{/* NetworkPolicies: which way out leads where. */}}

{{/* (dict "root" $ "component" … "name" … "to" (list "postgresql" "temporal" "collector" "partners" "api") "ingress" [...]) */}}
{{- define "trellis.networkPolicy" -}}
{{- $v := .root.Values -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "trellis.fullname" .root }}-{{ .component }}
  labels: {{ include "trellis.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels: {{ include "trellis.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- /* Not as an empty list, which Kubernetes leaves out, so that each server-side apply would be a change. */}}
  {{- with .ingress }}
  ingress: {{ toYaml . | nindent 4 }}
  {{- end }}
  egress:
    - to: {{ toYaml $v.global.networkPolicy.dnsTo | nindent 8 }}
      ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
    {{- range .to }}
    {{- with include (printf "trellis.to.%s" .) $.root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- end }}
    {{- if not (has "api" .to) }}
    {{- with $v.networkPolicy.extraEgress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end }}

{{- define "trellis.to.api" -}}
- to: [{podSelector: {matchLabels: {{ include "trellis.selector" (dict "root" . "component" "api") | fromYaml | toJson }}}}]
  ports: [{port: 8000}]
{{- end }}

{{- define "trellis.to.postgresql" -}}
{{- $bundled := list (dict "podSelector" (dict "matchLabels" (dict "app.kubernetes.io/name" "postgresql" "app.kubernetes.io/instance" (include "trellis.instance" .)))) -}}
- ports: [{port: {{ .Values.database.port }}}]
  {{- with ternary $bundled .Values.networkPolicy.postgresqlTo .Values.postgresql.enabled }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "trellis.to.temporal" -}}
{{- $bundled := list (dict "podSelector" (dict "matchLabels" (dict "app.kubernetes.io/name" "temporal" "app.kubernetes.io/instance" (include "trellis.instance" .)))) -}}
- ports: [{port: {{ include "trellis.temporalAddress" . | splitList ":" | last }}}]
  {{- with ternary $bundled .Values.networkPolicy.temporalTo .Values.temporal.enabled }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "trellis.to.collector" -}}
{{- with .Values.otel.endpoint }}
- ports: [{port: {{ include "trellis.portOf" . }}}]
  {{- with $.Values.networkPolicy.collectorTo }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "trellis.to.partners" -}}
{{- range list .Values.partners.payment.url .Values.partners.carrier.url | compact }}
- ports: [{port: {{ include "trellis.portOf" . }}}]
  {{- with $.Values.networkPolicy.partnersTo }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "trellis.portOf" -}}
{{- $url := urlParse . -}}
{{ regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}

{{/* The names under which the API answers: those that are given, the Service's for other pods, and those of probes and port-forwards. */}}
{{- define "trellis.allowedHosts" -}}
{{- $service := printf "%s-api" (include "trellis.fullname" .) -}}
{{- $names := list "localhost" $service -}}
{{- range list .Release.Namespace (printf "%s.svc" .Release.Namespace) (printf "%s.svc.cluster.local" .Release.Namespace) -}}
{{- $names = append $names (printf "%s.%s" $service .) -}}
{{- end -}}
{{ concat .Values.api.allowedHosts $names | uniq | join "," }}
{{- end }}

{{/* Who may read metrics: as a list of one ingress rule, or none. */}}
{{- define "trellis.metricsIngress" -}}
{{- with .Values.global.networkPolicy.metricsFrom }}
- from: {{ toYaml . | nindent 4 }}
  ports: [{port: 9464}]
{{- end }}
{{- end }}
