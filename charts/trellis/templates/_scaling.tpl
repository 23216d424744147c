{{/* How many pods, and how fast. */}}

{{/* As Kubernetes takes it, which knows no numbers where all pods go at once. (the strategy) */}}
{{- define "trellis.strategy" -}}
{{ ternary (dict "type" "Recreate") . (eq (.type | default "") "Recreate") | toYaml }}
{{- end }}

{{/* (dict "root" $ "component" … "labels" … "name" … "autoscaling" {…}) */}}
{{- define "trellis.hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  labels: {{ include "trellis.labels" . | nindent 4 }}
    {{- with .labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  minReplicas: {{ .autoscaling.minReplicas }}
  maxReplicas: {{ .autoscaling.maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ .autoscaling.targetCPU }}}
  {{- with .autoscaling.behavior }}
  behavior: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* For a single pod as well, whose node it does not keep from being drained, since one may be away: Helm cannot bring back a budget
     that a refused upgrade left out. (dict "root" $ "component" … "labels" … "name" … "pdb" {…}) */}}
{{- define "trellis.pdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  labels: {{ include "trellis.labels" . | nindent 4 }}
    {{- with .labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  maxUnavailable: {{ .pdb.maxUnavailable }}
  # A pod that waits for its servers does no work; it must not keep a node from being drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "trellis.selector" . | nindent 6 }}
      {{- with .labels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
{{- end }}

{{/* KEDA asks from a namespace of its own, where a short name leads nowhere. */}}
{{- define "trellis.kedaEndpoint" -}}
{{- if .Values.temporalClient.address -}}
{{ .Values.temporalClient.address }}
{{- else -}}
{{ include "trellis.serversName" . }}-temporal-frontend.{{ .Release.Namespace }}.svc:7233
{{- end -}}
{{- end }}

{{/* Which key of which Secret is what, for a TriggerAuthentication; as a list. */}}
{{- define "trellis.kedaSecrets" -}}
{{- with .Values.temporalClient -}}
{{- with include "trellis.apiKeySecret" $ }}
- {parameter: apiKey, name: {{ . }}, key: {{ $.Values.temporalClient.apiKey.key }}}
{{- end }}
{{- with .tls.certSecret }}
- {parameter: cert, name: {{ . }}, key: tls.crt}
- {parameter: key, name: {{ . }}, key: tls.key}
{{- end }}
{{- if .tls.caSecret }}
- {parameter: ca, name: {{ .tls.caSecret }}, key: {{ .tls.caKey }}}
{{- end }}
{{- end -}}
{{- end }}
