{{/* What tells the series of this installation from those of others. */}}

{{/* As the chart's monitors label them, or as the values say. */}}
{{- define "trellis.matchers" -}}
{{- $instance := printf `app_kubernetes_io_instance="%s"` (include "trellis.instance" .) -}}
{{ .Values.metrics.matchers | default (printf `namespace="%s",%s` .Release.Namespace $instance) }}
{{- end }}

{{/* The names of the task queues as the Temporal server writes them, for a regular expression. */}}
{{- define "trellis.serverQueues" -}}
{{- $queues := list .Values.taskQueues.order .Values.taskQueues.shipping -}}
{{- range .Values.workers -}}
{{- $queues = append $queues (include "trellis.worker" (dict "root" $ "worker" .) | fromJson).taskQueue -}}
{{- end -}}
{{ $queues | uniq | sortAlpha | join "|" | replace "-" "_" | replace "." "_" }}
{{- end }}

{{/* An expression of rules/, which are for any Prometheus, for this installation alone. (dict "root" $ "expr" …) */}}
{{- define "trellis.ownSeries" -}}
{{- $expr := .expr -}}
{{- $own := include "trellis.matchers" .root -}}
{{- /* Those of Kubernetes, and of every target. */}}
{{- $job := printf `{namespace="%s",job_name=~"%s-audit-[0-9]+"}` .root.Release.Namespace (include "trellis.fullname" .root) -}}
{{- $expr = $expr | replace `{job_name=~"(.+-)?trellis-audit-[0-9]+"}` $job -}}
{{- $expr = $expr | replace `up{job=~".*trellis.*"}` (printf `up{%s,job="%s"}` $own (include "trellis.name" .root)) -}}
{{- /* A Temporal server of others is told by its own namespace, which Prometheus may have renamed. */}}
{{- $server := `approximate_backlog_age_seconds{` -}}
{{- if .root.Values.temporal.enabled -}}
{{- $expr = $expr | replace $server (print $server $own ",") -}}
{{- else -}}
{{- $queues := printf `taskqueue=~"%s"` (include "trellis.serverQueues" .root) -}}
{{- $namespace := .root.Values.temporalClient.namespace -}}
{{- $theirs := printf `(%snamespace="%s",%s} or %sexported_namespace="%s",%s})` $server $namespace $queues $server $namespace $queues -}}
{{- $expr = $expr | replace `approximate_backlog_age_seconds{taskqueue!~"temporal_sys.*|default_worker_tq"}` $theirs -}}
{{- end -}}
{{- /* Ours and the SDK's, with matchers and without; not what is in quotes, and not names of labels. */}}
{{- $metric := `(^|[^"a-z_:])((?:trellis|temporal)[_:][a-z0-9_:]+)` -}}
{{- $expr = regexReplaceAll (print $metric `\{`) $expr (print `${1}${2}{` $own `,`) -}}
{{- regexReplaceAll (print $metric `($|[^{a-z0-9_:])`) $expr (print `${1}${2}{` $own `}${3}`) -}}
{{- end }}
