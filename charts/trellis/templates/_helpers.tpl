{{/* Names, labels, image: what every template uses. */}}

{{- define "trellis.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* With `--reuse-values`, Helm leaves out what an older chart did not have, and the templates would end in "nil pointer". */}}
{{- define "trellis.complete" -}}
{{- $values := .Values -}}
{{- range regexSplit "\\s+" (include "trellis.needed" . | trim) -1 -}}
  {{- $found := $values -}}
  {{- range splitList "." . -}}
    {{- $found = index ($found | default dict) . -}}
  {{- end -}}
  {{- if kindIs "invalid" $found -}}
    {{- fail (printf "the value %s is missing, as after an upgrade with --reuse-values from a chart that did not have it: use --reset-then-reuse-values, or give your values once more" .) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* Every map of values.yaml that templates look into, and what they write down as it is. */}}
{{- define "trellis.needed" -}}
global.trellis global.networkPolicy production sandbox image postgresql.enabled temporal.enabled database migration temporalClient.tls
temporalClient.apiKey taskQueues orders.addressAfterReview partners.payment.tls partners.payment.tokenKey partners.carrier.tls
partners.carrier.tokenKey otel serviceAccount podDefaults.podSecurityContext podDefaults.containerSecurityContext api.strategy
api.probes api.resources api.allowedHosts api.exposure api.service api.ingress api.httpRoute api.autoscaling api.pdb
workerDefaults.resources workerDefaults.slots workerDefaults.strategy workerDefaults.probes workerDefaults.autoscaling
workerDefaults.keda workerDefaults.pdb workers jobs.backoffLimit jobs.resources workerVersioning.controller reconcile.every
reconcile.schedule audit.schedule audit.timeZone audit.partners networkPolicy metrics.podMonitor metrics.serviceMonitor
metrics.prometheusRule metrics.dashboards test.patienceSeconds
{{- end }}

{{- define "trellis.fullname" -}}
{{- include "trellis.complete" . -}}
{{- $name := include "trellis.name" . -}}
{{- $given := .Values.fullnameOverride | default .Values.global.trellis.fullnameOverride -}}
{{- /* In an umbrella chart the release's name alone may be another's, or that of another alias. */}}
{{- $alone := and (contains $name .Release.Name) (not (include "trellis.owner" .)) -}}
{{ include "trellis.dnsName" (list ($given | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) $alone)) 40) }}
{{- end }}

{{/* What selectors go by. (dict "root" $ "component" "api") */}}
{{- define "trellis.selector" -}}
app.kubernetes.io/name: {{ include "trellis.name" .root }}
app.kubernetes.io/instance: {{ include "trellis.instance" .root }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "trellis.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "trellis.selector" . }}
app.kubernetes.io/version: {{ include "trellis.version" .root | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* Tag and beginning of the digest: names a version, and fits a label. */}}
{{- define "trellis.version" -}}
{{- $digest := .Values.image.digest | trimPrefix "sha256:" | trunc 12 -}}
{{ list (.Values.image.tag | default (ternary "" .Chart.AppVersion (ne $digest ""))) $digest | compact | join "-" | trunc 63 }}
{{- end }}

{{- define "trellis.image" -}}
{{- with .Values.image -}}
{{ include "trellis.repository" (dict "root" $ "repository" .repository) }}
{{- if or .tag (not .digest) }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- with .digest }}@{{ . }}{{ end }}
{{- end -}}
{{- end }}

{{- define "trellis.serviceAccountName" -}}
{{ .Values.serviceAccount.name | default (include "trellis.fullname" .) }}
{{- end }}

{{/* Seconds as people say them. */}}
{{- define "trellis.duration" -}}
{{- $seconds := int64 . -}}
{{- if eq (mod $seconds 3600) 0 -}}
{{ div $seconds 3600 }} h
{{- else if eq (mod $seconds 60) 0 -}}
{{ div $seconds 60 }} min
{{- else -}}
{{ $seconds }} s
{{- end -}}
{{- end }}

{{/* A worker with what it shares with the others, as JSON. (dict "root" $ "worker" {…}) */}}
{{- define "trellis.worker" -}}
{{- include "trellis.complete" .root -}}
{{- $v := .root.Values -}}
{{- $worker := mergeOverwrite (deepCopy $v.podDefaults) (deepCopy $v.workerDefaults) (deepCopy (.worker | default dict)) -}}
{{- $queue := ternary $v.taskQueues.shipping $v.taskQueues.order (eq $worker.role "shipping") -}}
{{ set $worker "taskQueue" ($worker.taskQueue | default $queue) | toJson }}
{{- end }}
