{{/* What values.schema.json cannot say, or not in words that help. All faults at once. */}}
{{- define "trellis.validate" -}}
{{- $faults := concat (include "trellis.faults.servers" . | fromJsonArray) (include "trellis.faults.workers" . | fromJsonArray) (include "trellis.faults.rest" . | fromJsonArray) -}}
{{- if $faults }}
{{- fail (printf "these values do not work:\n- %s\n" (join "\n- " $faults)) }}
{{- end }}
{{- end }}

{{- define "trellis.faults.servers" -}}
{{- $faults := list -}}
{{- with .Values -}}
{{- $own := or .database.password .database.existingSecret -}}
{{- if not .postgresql.enabled -}}
  {{- if and (not .database.host) (not .database.urlKey) -}}
    {{- $faults = append $faults "database.host is empty: set it to the host of your PostgreSQL, or postgresql.enabled=true for the one of this chart" -}}
  {{- end -}}
  {{- if not $own -}}
    {{- $faults = append $faults (printf "nothing opens the database: set database.existingSecret to a Secret with %s's password under the key %s, or set database.password" .database.user .database.passwordKey) -}}
  {{- end -}}
  {{- if and .temporal.enabled (eq (dig "database" "host" "" .temporal) "{{ .Release.Name }}-postgresql") -}}
    {{- $faults = append $faults "Temporal of this chart has no PostgreSQL: set temporal.database.host and temporal.database.existingSecret, or temporal.enabled=false and temporalClient.address" -}}
  {{- end -}}
{{- else if .database.host -}}
  {{- $faults = append $faults "database.host is set, and PostgreSQL of this chart would run for nothing: set postgresql.enabled=false" -}}
{{- end -}}
{{- if and .database.password .database.existingSecret -}}
  {{- $faults = append $faults "database.password and database.existingSecret are both set: set one" -}}
{{- end -}}
{{- if and .migration.password .migration.existingSecret -}}
  {{- $faults = append $faults "migration.password and migration.existingSecret are both set: set one" -}}
{{- end -}}
{{- if and .database.password (not .migration.password) (not .migration.existingSecret) (ne .migration.passwordKey .database.passwordKey) -}}
  {{- $faults = append $faults (printf "database.password is set, and nothing opens the database for %s: set migration.password or migration.existingSecret" .migration.user) -}}
{{- end -}}
{{- if and .temporal.enabled .temporalClient.address -}}
  {{- $faults = append $faults "temporalClient.address is set, and Temporal of this chart would run for nothing: set temporal.enabled=false" -}}
{{- else if not (or .temporal.enabled .temporalClient.address) -}}
  {{- $faults = append $faults "temporalClient.address is empty: set it to host:port of your Temporal's frontend, or temporal.enabled=true for the one of this chart" -}}
{{- end -}}
{{- if and .temporalClient.apiKey.value .temporalClient.apiKey.existingSecret -}}
  {{- $faults = append $faults "temporalClient.apiKey.value and .existingSecret are both set: set one" -}}
{{- end -}}
{{- end -}}
{{ toJson $faults }}
{{- end }}

{{- define "trellis.faults.workers" -}}
{{- $faults := list -}}
{{- $served := dict -}}
{{- $v := .Values -}}
{{- range $key, $worker := $v.workers -}}
  {{- $worker = include "trellis.worker" (dict "root" $ "worker" $worker) | fromJson -}}
  {{- $_ := set $served (printf "%s on %s" $worker.role $worker.taskQueue) true -}}
  {{- if le (include "trellis.workerGrace" $worker | float64) ($worker.gracefulShutdownSeconds | float64) -}}
    {{- $faults = append $faults (printf "workers.%s.terminationGracePeriodSeconds is %v, and running attempts get %v: set it to more than gracefulShutdownSeconds, or leave it out" $key $worker.terminationGracePeriodSeconds $worker.gracefulShutdownSeconds) -}}
  {{- end -}}
  {{- if and $worker.autoscaling.enabled $worker.keda.enabled -}}
    {{- $faults = append $faults (printf "workers.%s: autoscaling and keda are both on, and would fight: set one" $key) -}}
  {{- end -}}
  {{- if and $worker.keda.enabled (lt (int $worker.keda.minReplicas) 1) -}}
    {{- $faults = append $faults (printf "workers.%s.keda.minReplicas is %v: set it to 1 or more, KEDA does not see running attempts and would stop the last worker" $key $worker.keda.minReplicas) -}}
  {{- end -}}
  {{- if and (or $worker.autoscaling.enabled $worker.keda.enabled) $v.workerVersioning.controller.enabled -}}
    {{- $faults = append $faults (printf "workers.%s: the worker controller has a Deployment per version; scale them by a WorkerResourceTemplate of your own, and set autoscaling.enabled and keda.enabled to false" $key) -}}
  {{- end -}}
  {{- range $kind := list "autoscaling" "keda" -}}
    {{- $range := get $worker $kind -}}
    {{- if gt (int $range.minReplicas) (int $range.maxReplicas) -}}
      {{- $faults = append $faults (printf "workers.%s.%s: minReplicas is more than maxReplicas" $key $kind) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- range list (list "default" "order" $v.taskQueues.order) (list "shipping" "shipping" $v.taskQueues.shipping) -}}
  {{- if not (hasKey $served (printf "%s on %s" (first .) (last .))) -}}
    {{- $faults = append $faults (printf "taskQueues.%s is %s, and no worker with role %s serves it, so orders would wait for ever: add one to workers" (index . 1) (last .) (first .)) -}}
  {{- end -}}
{{- end -}}
{{- with $v.workerVersioning -}}
{{- if and .enabled (eq .behavior "PINNED") (not .controller.enabled) -}}
  {{- $faults = append $faults "workerVersioning.behavior is PINNED, and a Deployment keeps no workers of the old version, so open orders would stop: set it to AUTO_UPGRADE, or set controller.enabled" -}}
{{- end -}}
{{- if and .controller.enabled (not .enabled) -}}
  {{- $faults = append $faults "workerVersioning.controller.enabled needs workerVersioning.enabled=true" -}}
{{- end -}}
{{- end -}}
{{ toJson $faults }}
{{- end }}

{{- define "trellis.faults.rest" -}}
{{- $faults := list -}}
{{- with .Values -}}
{{- $elsewhere := dict
  "database_pool_size" "database.poolSize"
  "temporal_address" "temporalClient.address"
  "temporal_namespace" "temporalClient.namespace"
  "temporal_tls" "temporalClient.tls.enabled"
  "order_task_queue" "taskQueues.order"
  "shipping_task_queue" "taskQueues.shipping"
  "max_concurrent_activities" "workerDefaults.slots.activities"
  "max_concurrent_workflow_tasks" "workerDefaults.slots.workflowTasks"
  "max_cached_workflows" "workerDefaults.cachedWorkflows"
  "graceful_shutdown_timeout" "workerDefaults.gracefulShutdownSeconds"
  "payment_url" "partners.payment.url"
  "carrier_url" "partners.carrier.url" -}}
{{- range $name, $_ := .settings -}}
  {{- with get $elsewhere $name -}}
    {{- $faults = append $faults (printf "settings.%s: set %s instead" $name .) -}}
  {{- end -}}
{{- end -}}
{{- if gt (int .api.autoscaling.minReplicas) (int .api.autoscaling.maxReplicas) -}}
  {{- $faults = append $faults "api.autoscaling: minReplicas is more than maxReplicas" -}}
{{- end -}}
{{- with .api.terminationGracePeriodSeconds -}}
  {{- if lt (int .) (add $.Values.api.preStopSeconds 6 | int) -}}
    {{- $faults = append $faults (printf "api.terminationGracePeriodSeconds is %v: set it to more than preStopSeconds and the 5 seconds that open requests get, or leave it out" .) -}}
  {{- end -}}
{{- end -}}
{{- if and .api.ingress.enabled (not .api.ingress.hosts) -}}
  {{- $faults = append $faults "api.ingress.enabled, and no host: set api.ingress.hosts to [{host: …}]" -}}
{{- end -}}
{{- if and .api.httpRoute.enabled (not .api.httpRoute.parentRefs) -}}
  {{- $faults = append $faults "api.httpRoute.enabled, and no Gateway: set api.httpRoute.parentRefs to [{name: …}]" -}}
{{- end -}}
{{- if and .api.service.nodePort (eq .api.service.type "ClusterIP") -}}
  {{- $faults = append $faults "api.service.nodePort is set: set api.service.type to NodePort as well" -}}
{{- end -}}
{{- if and .metrics.podMonitor.enabled .metrics.serviceMonitor.enabled -}}
  {{- $faults = append $faults "metrics.podMonitor and metrics.serviceMonitor are both on, and everything would be counted twice: set one" -}}
{{- end -}}
{{- if and (not .serviceAccount.create) (not .serviceAccount.name) -}}
  {{- $faults = append $faults "serviceAccount.create is false: set serviceAccount.name to one that exists" -}}
{{- end -}}
{{- end -}}
{{ toJson $faults }}
{{- end }}
