{{/* A Job cannot be changed, so its name has the hash of what it runs: what stays as it is keeps its Job, and a release that was
     refused half-way leaves none that the next one would have to change. The selector is the chart's own, so that the Job in the
     cluster is the one in the manifest: Helm patches one to the other when it rolls back a release that was refused, and Kubernetes
     takes no patch but an empty one.
     Called with (dict "root" $ "component" "…" "spec" "the pod's"). */}}
{{- define "trellis-temporal.job" -}}
{{- $ttl := .root.Values.jobs.ttlSecondsAfterFinished -}}
{{- $labels := include "trellis-temporal.labels" . -}}
{{- $name := printf "%s-%s-%s" (include "trellis-temporal.fullname" .root) .component (list $labels .root.Values.podLabels .root.Values.podAnnotations .spec $ttl | toJson | sha256sum | trunc 7) -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ $name }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "trellis-temporal.kubeScore" .root | nindent 4 }}
spec:
  # Waiting is done inside; these are for what cannot be mended by waiting.
  backoffLimit: 6
  {{- if kindIs "invalid" $ttl | not }}
  ttlSecondsAfterFinished: {{ int $ttl }}
  {{- end }}
  manualSelector: true
  selector:
    matchLabels:
      trellis.dev/job: {{ $name }}
  template:
    metadata:
      labels:
        {{- include "trellis-temporal.podLabels" . | nindent 8 }}
        trellis.dev/job: {{ $name }}
      {{- with .root.Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- .spec | nindent 6 }}
{{- end }}
