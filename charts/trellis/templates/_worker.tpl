{{/* What only workers have. */}}

{{/* Environment of a worker, over the ConfigMap's. (dict "root" $ "worker" {…}) */}}
{{- define "trellis.workerEnv" -}}
{{- with .worker -}}
- {name: {{ ternary "TRELLIS_SHIPPING_TASK_QUEUE" "TRELLIS_ORDER_TASK_QUEUE" (eq .role "shipping") }}, value: {{ .taskQueue | quote }}}
- {name: TRELLIS_MAX_CONCURRENT_ACTIVITIES, value: {{ .slots.activities | toJson | quote }}}
- {name: TRELLIS_MAX_CONCURRENT_WORKFLOW_TASKS, value: {{ .slots.workflowTasks | toJson | quote }}}
- {name: TRELLIS_MAX_CACHED_WORKFLOWS, value: {{ .cachedWorkflows | toJson | quote }}}
- {name: TRELLIS_GRACEFUL_SHUTDOWN_TIMEOUT, value: {{ .gracefulShutdownSeconds | toJson | quote }}}
{{- end }}
{{- with .root.Values.workerVersioning }}
{{- if .enabled }}
- {name: TRELLIS_VERSIONING_BEHAVIOR, value: {{ lower .behavior }}}
{{- if not .controller.enabled }}
{{ include "trellis.versionEnv" $.root }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The names under which the worker controller gives the version as well. */}}
{{- define "trellis.versionEnv" -}}
- {name: TEMPORAL_DEPLOYMENT_NAME, value: {{ include "trellis.deploymentName" . }}}
- {name: TEMPORAL_WORKER_BUILD_ID, value: {{ include "trellis.buildId" . | quote }}}
{{- end }}

{{- define "trellis.deploymentName" -}}
{{ .Values.workerVersioning.deploymentName | default (include "trellis.fullname" . | replace "." "-") }}
{{- end }}

{{- define "trellis.buildId" -}}
{{ .Values.workerVersioning.buildId | default (include "trellis.version" .) }}
{{- end }}

{{- define "trellis.workerGrace" -}}
{{ .terminationGracePeriodSeconds | default (addf .gracefulShutdownSeconds 15 | ceil) | int }}
{{- end }}
