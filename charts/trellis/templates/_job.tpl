{{/* Jobs. They wait for their servers by themselves, or are tried again. */}}

{{/* A Job cannot be changed, so its name has the hash of what it runs: what stays as it is keeps its Job, and a release that was
     refused half-way leaves none that the next one would have to change. The dict of the pod's parts, with name and args, and ttl:
     the most seconds that it stays. */}}
{{- define "trellis.job" -}}
{{- $jobs := .root.Values.jobs -}}
{{- $ttl := $jobs.ttlSecondsAfterFinished -}}
{{- if and .ttl (kindIs "invalid" $ttl | not) -}}
{{- $ttl = min $ttl .ttl -}}
{{- end -}}
{{- $hash := list (include "trellis.jobTemplate" .) $jobs.backoffLimit $ttl | toJson | sha256sum | trunc 7 -}}
{{- $name := printf "%s-%s-%s" (include "trellis.fullname" .root) .name $hash -}}
{{- $label := dict "trellis.dev/job" $name -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ $name }}
  labels: {{ include "trellis.labels" . | nindent 4 }}
  annotations:
    {{- include "trellis.scoreAnnotations" .root | nindent 4 }}
spec:
  backoffLimit: {{ $jobs.backoffLimit }}
  {{- if kindIs "invalid" $ttl | not }}
  ttlSecondsAfterFinished: {{ int $ttl }}
  {{- end }}
  # Of the chart's own, so that the Job in the cluster is the one in the manifest, and a patch of one to the other is empty: Helm
  # makes such a patch when it rolls back a release that was refused, and Kubernetes takes no other.
  manualSelector: true
  selector:
    matchLabels: {{ toYaml $label | nindent 6 }}
  template: {{ include "trellis.jobTemplate" (merge (dict "labels" $label) .) | nindent 4 }}
{{- end }}

{{- define "trellis.jobTemplate" -}}
metadata: {{ include "trellis.podMetadata" . | nindent 2 }}
spec: {{ include "trellis.jobPod" . | nindent 2 }}
{{- end }}

{{/* The same by schedule: a Job that fails is how somebody hears of it, and trying again would say the same. The dict as above, with
     schedule and activeDeadlineSeconds. */}}
{{- define "trellis.cronJob" -}}
apiVersion: batch/v1
kind: CronJob
metadata:
  name: {{ include "trellis.fullname" .root }}-{{ .name }}
  labels: {{ include "trellis.labels" . | nindent 4 }}
  annotations:
    {{- include "trellis.scoreAnnotations" .root | nindent 4 }}
spec:
  schedule: {{ .schedule | quote }}
  timeZone: {{ .root.Values.audit.timeZone }}
  concurrencyPolicy: Forbid
  startingDeadlineSeconds: 3600
  failedJobsHistoryLimit: 3
  successfulJobsHistoryLimit: 1
  jobTemplate:
    spec:
      backoffLimit: 0
      activeDeadlineSeconds: {{ int .root.Values.audit.activeDeadlineSeconds }}
      template: {{ include "trellis.jobTemplate" (merge (dict "restartPolicy" "Never") .) | nindent 8 }}
{{- end }}

{{- define "trellis.jobPod" -}}
{{ include "trellis.podSpec" . }}
restartPolicy: {{ .restartPolicy | default "OnFailure" }}
containers:
  - name: {{ .name }}
    {{- include "trellis.container" . | nindent 4 }}
    args: {{ toJson .args }}
    resources: {{ toYaml .root.Values.jobs.resources | nindent 6 }}
{{- end }}
