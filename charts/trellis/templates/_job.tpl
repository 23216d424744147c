{{/* A Job per revision, since a Job cannot be changed; it waits for its servers by itself, or is tried again. The dict of the
     pod's parts, with name and args. */}}
{{- define "trellis.job" -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ include "trellis.fullname" .root }}-{{ .name }}-{{ .root.Release.Revision }}
  labels: {{ include "trellis.labels" . | nindent 4 }}
  annotations:
    # Under Argo CD every revision is the first: the Job is replaced.
    argocd.argoproj.io/sync-options: Force=true,Replace=true
    {{- include "trellis.scoreAnnotations" .root | nindent 4 }}
spec:
  backoffLimit: {{ .root.Values.jobs.backoffLimit }}
  template:
    metadata: {{ include "trellis.podMetadata" . | nindent 6 }}
    spec: {{ include "trellis.jobPod" . | nindent 6 }}
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
