{{/* What values.schema.json cannot say, or not in words that help. All faults at once. */}}
{{- define "trellis.validate" -}}
{{- include "trellis.complete" . -}}
{{- $faults := list -}}
{{- range list "partners" "servers" "bundled" "workers" "exposure" "rest" -}}
{{- $faults = concat $faults (include (print "trellis.faults." .) $ | fromJsonArray) -}}
{{- end -}}
{{- if $faults }}
{{- fail (printf "these values do not work:\n- %s\n" (join "\n- " $faults)) }}
{{- end }}
{{- end }}

{{- define "trellis.faults.partners" -}}
{{- $faults := list -}}
{{- $partners := .Values.partners -}}
{{- $missing := list -}}
{{- range $name := list "payment" "carrier" -}}
  {{- $url := (get $partners $name).url -}}
  {{- if not $url -}}
    {{- $missing = append $missing (printf "partners.%s.url" $name) -}}
  {{- else if and (eq (urlParse $url).scheme "http") (not (has (urlParse $url).hostname (list "localhost" "127.0.0.1"))) (not $partners.allowHttp) -}}
    {{- $faults = append $faults (printf "partners.%s.url is http, and whoever is on the way could read tokens and addresses: set it to https://…, or partners.allowHttp=true" $name) -}}
  {{- end -}}
{{- end -}}
{{- if and $missing (not .Values.sandbox.enabled) -}}
  {{- $one := eq (len $missing) 1 -}}
  {{- $faults = append $faults (printf "%s %s empty: set %s, or sandbox.enabled=true for the built-in sandbox, where no money moves and no parcel leaves" (join " and " $missing) (ternary "is" "are" $one) (ternary "it" "both" $one)) -}}
{{- end -}}
{{- if or .Values.production (lt (len $missing) 2) -}}
  {{- $why := ternary "production=true" "a partner's URL is set" .Values.production -}}
  {{- if not (hasKey .Values.settings "review_timeout_seconds") -}}
    {{- $faults = append $faults (printf "settings.review_timeout_seconds is not set, and %s: a demonstration's 10 seconds are over before anybody has read an order; set it to the seconds a review may take, such as 86400 for a day" $why) -}}
  {{- end -}}
  {{- if or .Values.settings.failpoints .Values.settings.failpoints_allowed -}}
    {{- $faults = append $faults (printf "settings.failpoints breaks orders on purpose, and %s: leave it and settings.failpoints_allowed out" $why) -}}
  {{- end -}}
{{- else if and .Values.settings.failpoints (not .Values.settings.failpoints_allowed) -}}
  {{- $faults = append $faults "settings.failpoints breaks orders on purpose: set settings.failpoints_allowed=true as well, if that is what you want" -}}
{{- end -}}
{{- $places := dict "podDefaults" .Values.podDefaults "api" .Values.api "workerDefaults" .Values.workerDefaults -}}
{{- range $key, $worker := .Values.workers -}}
  {{- $_ := set $places (printf "workers.%s" $key) ($worker | default dict) -}}
{{- end -}}
{{- range $place, $options := $places -}}
  {{- if and (eq ($options.dnsPolicy | default "") "None") (not (dig "nameservers" list ($options.dnsConfig | default dict))) -}}
    {{- $faults = append $faults (printf "%s.dnsPolicy is None, so a pod knows no name server: set %s.dnsConfig.nameservers" $place $place) -}}
  {{- end -}}
  {{- range $options.extraEnv -}}
    {{- if hasPrefix "TRELLIS_FAILPOINTS" .name -}}
      {{- $faults = append $faults (printf "%s.extraEnv has %s: set settings.%s instead" $place .name (.name | trimPrefix "TRELLIS_" | lower)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.sandbox.enabled $missing .Values.postgresql.enabled (not (dig "sandbox" "enabled" true .Values.postgresql)) -}}
  {{- $faults = append $faults "postgresql.sandbox.enabled is false, and the sandbox has nowhere to keep its books: set it to true" -}}
{{- end -}}
{{ toJson $faults }}
{{- end }}

{{/* What lets others than the release's own pods in: by which way, over TLS or not, and who is asked. */}}
{{- define "trellis.faults.exposure" -}}
{{- $faults := list -}}
{{- with .Values.api -}}
{{- $ways := list -}}
{{- if .ingress.enabled -}}{{- $ways = append $ways "api.ingress.enabled" -}}{{- end -}}
{{- if .httpRoute.enabled -}}{{- $ways = append $ways "api.httpRoute.enabled" -}}{{- end -}}
{{- if ne .service.type "ClusterIP" -}}{{- $ways = append $ways (printf "api.service.type=%s" .service.type) -}}{{- end -}}
{{- if $ways -}}
  {{- $open := join " and " $ways -}}
  {{- $covered := and .ingress.enabled .ingress.tls (eq (len $ways) 1) -}}
  {{- if not (or .exposure.tls $covered) -}}
    {{- $faults = append $faults (printf "%s, and nothing says where TLS ends: set %sapi.exposure.tls to elsewhere where a gateway, load balancer or proxy has the certificate, or to none for calls in clear" $open (ternary "api.ingress.tls, or " "" .ingress.enabled)) -}}
  {{- end -}}
  {{- if not .exposure.authentication -}}
    {{- $faults = append $faults (printf "%s, and the API has no login, so whoever reaches it may approve and cancel orders: set api.exposure.authentication to proxy if one checks the callers, to network if only trusted networks reach it, or to none" $open) -}}
  {{- end -}}
  {{- if and $.Values.global.networkPolicy.enabled (not $.Values.networkPolicy.apiFrom) -}}
    {{- $faults = append $faults (printf "%s, and the NetworkPolicy lets in the release's own pods alone: set networkPolicy.apiFrom to who may call, such as the namespace of the Ingress controller, or an ipBlock" $open) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
{{ toJson $faults }}
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
  {{- if and .temporal.enabled (include "trellis.temporalOnBundled" $) -}}
    {{- $faults = append $faults "Temporal of this chart has no PostgreSQL: set temporal.database.host and temporal.database.existingSecret, or temporal.enabled=false and temporalClient.address" -}}
  {{- end -}}
{{- else if .database.host -}}
  {{- $faults = append $faults "database.host is set, and PostgreSQL of this chart would run for nothing: set postgresql.enabled=false" -}}
{{- end -}}
{{- with include "trellis.wrongHost" .database.host -}}
  {{- $faults = append $faults (printf "database.host is %s: %s database.port" $.Values.database.host .) -}}
{{- end -}}
{{- with .temporalClient.address -}}
  {{- $port := regexFind ":[0-9]+$" . -}}
  {{- if not $port -}}
    {{- $faults = append $faults (printf "temporalClient.address is %s: set it to host:port, such as temporal.example.com:7233 or [fd00::1]:7233" .) -}}
  {{- else if include "trellis.wrongHost" (trimSuffix $port .) -}}
    {{- $faults = append $faults (printf "temporalClient.address is %s: set it to host:port without a scheme, an IPv6 address in brackets, such as [fd00::1]:7233" .) -}}
  {{- end -}}
{{- end -}}
{{- range $name, $value := dict "database.password" .database.password "migration.password" .migration.password "temporalClient.apiKey.value" .temporalClient.apiKey.value -}}
  {{- if regexMatch "[\r\n]" $value -}}
    {{- $faults = append $faults (printf "%s has a line feed, which some readers cut off and some do not: leave it out" $name) -}}
  {{- end -}}
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

{{/* What is wrong with a host, and nothing where it is fine. (the host) */}}
{{- define "trellis.wrongHost" -}}
{{- if regexMatch "^[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f.]*$" . -}}
put the IPv6 address in brackets; a port goes to
{{- else if not (regexMatch "^([-_.A-Za-z0-9]*|\\[[0-9A-Fa-f:.]+\\])$" .) -}}
set it to the name or address alone; a port goes to
{{- end -}}
{{- end }}

{{/* What the servers of this chart do not have, and what has to be said of them once. */}}
{{- define "trellis.faults.bundled" -}}
{{- $faults := list -}}
{{- $v := .Values -}}
{{- $instead := "leave it out, or set postgresql.enabled=false for a PostgreSQL of your own" -}}
{{- if $v.postgresql.enabled -}}
  {{- if or $v.database.password $v.migration.password -}}
    {{- $faults = append $faults (printf "database.password and migration.password are not those of this chart's PostgreSQL, which has its own in a Secret: %s" $instead) -}}
  {{- end -}}
  {{- range $name := list "database" "migration" -}}
    {{- with (get $v $name).existingSecret -}}
      {{- if ne . (include "trellis.bundledSecret" $) -}}
        {{- $faults = append $faults (printf "%s.existingSecret is %s, and this chart's PostgreSQL takes its passwords from %s: set global.trellis.postgresqlSecret=%s for all, or postgresql.enabled=false" $name . (include "trellis.bundledSecret" $) .) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
  {{- $keys := dict "trellis_app" "app-password" "trellis_migrate" "migrate-password" -}}
  {{- range $name := list "database" "migration" -}}
    {{- with get $v $name -}}
      {{- if and (hasKey $keys .user) (ne .passwordKey (get $keys .user)) -}}
        {{- $faults = append $faults (printf "%s.passwordKey is %s, and this chart's PostgreSQL reads the password of %s from %s: set it to that, or leave it out" $name .passwordKey .user (get $keys .user)) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
  {{- range list (list "database.name" $v.database.name (list "trellis")) (list "database.user" $v.database.user (list "trellis_app" "trellis_migrate")) (list "migration.user" $v.migration.user (list "trellis_migrate")) (list "database.port" (toString $v.database.port) (list "5432")) (list "database.sslMode" $v.database.sslMode (list "" "disable" "allow" "prefer")) (list "database.caSecret" $v.database.caSecret (list "")) (list "database.urlKey" $v.database.urlKey (list "")) (list "migration.urlKey" $v.migration.urlKey (list "")) -}}
    {{- if not (has (index . 1) (last .)) -}}
      {{- $faults = append $faults (printf "%s is %v, and this chart's PostgreSQL has no such thing: %s" (first .) (index . 1) $instead) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if $v.temporal.enabled -}}
  {{- $names := list -}}
  {{- range dig "namespaces" (list (dict "name" "default")) $v.temporal -}}
    {{- $names = append $names .name -}}
  {{- end -}}
  {{- if not (has $v.temporalClient.namespace $names) -}}
    {{- $faults = append $faults (printf "temporalClient.namespace is %s, and this chart's Temporal has %s: set temporal.namespaces to [{name: %s, retention: 168h}]" $v.temporalClient.namespace (join ", " $names | default "none") $v.temporalClient.namespace) -}}
  {{- end -}}
  {{- if include "trellis.temporalTls" . | eq "true" -}}
    {{- $faults = append $faults "temporalClient.tls or temporalClient.apiKey is set, and this chart's Temporal has neither TLS nor keys: leave them out, or set temporal.enabled=false for a Temporal of your own" -}}
  {{- end -}}
  {{- $own := tpl (dig "database" "existingSecret" "" $v.temporal) . -}}
  {{- if and $v.postgresql.enabled (include "trellis.temporalOnBundled" $) -}}
    {{- $secret := $own | default (tpl $v.global.trellis.postgresqlSecret .) | default (include "trellis.bundledHost" .) -}}
    {{- if ne $secret (include "trellis.bundledSecret" .) -}}
      {{- $faults = append $faults (printf "Temporal opens its database with the Secret %s, and this chart's PostgreSQL takes its passwords from %s: set global.trellis.postgresqlSecret for both, and neither postgresql.auth.existingSecret nor temporal.database.existingSecret" $secret (include "trellis.bundledSecret" .)) -}}
    {{- end -}}
    {{- range list (list "port" "5432") (list "user" "temporal") (list "name" "temporal") (list "visibilityName" "temporal_visibility") (list "existingSecretKey" "temporal-password") -}}
      {{- $value := dig "database" (first .) (last .) $v.temporal | toString -}}
      {{- if ne $value (last .) -}}
        {{- $faults = append $faults (printf "temporal.database.%s is %s, and this chart's PostgreSQL has %s: leave it out, or set temporal.database.host for a PostgreSQL of your own" (first .) $value (last .)) -}}
      {{- end -}}
    {{- end -}}
    {{- if dig "database" "tls" "enabled" false $v.temporal -}}
      {{- $faults = append $faults "temporal.database.tls.enabled is true, and this chart's PostgreSQL has no TLS: leave it out, or set temporal.database.host for a PostgreSQL of your own" -}}
    {{- end -}}
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
  "database_pooler" "database.pooler"
  "temporal_address" "temporalClient.address"
  "temporal_namespace" "temporalClient.namespace"
  "temporal_tls" "temporalClient.tls.enabled"
  "order_task_queue" "taskQueues.order"
  "shipping_task_queue" "taskQueues.shipping"
  "max_concurrent_activities" "workerDefaults.slots.activities"
  "max_concurrent_workflow_tasks" "workerDefaults.slots.workflowTasks"
  "max_cached_workflows" "workerDefaults.cachedWorkflows"
  "graceful_shutdown_timeout" "workerDefaults.gracefulShutdownSeconds"
  "sandbox" "sandbox.enabled"
  "demo_price" "orders.demoPrice"
  "address_after_review" "orders.addressAfterReview"
  "allowed_hosts" "api.allowedHosts"
  "partners_allow_http" "partners.allowHttp"
  "payment_token" "partners.payment.existingSecret"
  "payment_tls_ca" "partners.payment.tls.caSecret"
  "payment_tls_cert" "partners.payment.tls.certSecret"
  "payment_tls_key" "partners.payment.tls.certSecret"
  "carrier_token" "partners.carrier.existingSecret"
  "carrier_tls_ca" "partners.carrier.tls.caSecret"
  "carrier_tls_cert" "partners.carrier.tls.certSecret"
  "carrier_tls_key" "partners.carrier.tls.certSecret"
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
