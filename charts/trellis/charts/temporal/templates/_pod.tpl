{{/* What all pods share; every image runs as 1000. */}}
{{- define "trellis-temporal.podSpec" -}}
serviceAccountName: {{ include "trellis-temporal.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "trellis.podSecurity" (dict "root" . "context" .Values.podSecurityContext) | nindent 2 }}
{{- include "trellis.pullSecrets" . | nindent 0 }}
{{- include "trellis.podOptions" .Values }}
{{- end }}

{{/* The chart's variables, but those that are given, and these: Kubernetes applies no list that has a name twice.
     (dict "own" "the chart's, as text" "given" .Values.….extraEnv) */}}
{{- define "trellis-temporal.env" -}}
{{- $given := dict -}}
{{- range .given -}}
  {{- if hasKey $given .name -}}
    {{- fail (printf "extraEnv has %s twice: leave one out" .name) -}}
  {{- end -}}
  {{- $_ := set $given .name true -}}
{{- end -}}
{{- $env := list -}}
{{- range .own | fromYamlArray -}}
  {{- if not (hasKey $given .name) -}}{{- $env = append $env . -}}{{- end -}}
{{- end -}}
{{ concat $env .given | toYaml }}
{{- end }}

{{- define "trellis-temporal.securityContext" -}}
{{ toJson .Values.containerSecurityContext }}
{{- end }}

{{/* Volumes of every pod, and where containers have them. */}}
{{- define "trellis-temporal.volumes" -}}
{{- with .Values.extraVolumes }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- define "trellis-temporal.mounts" -}}
{{- with .Values.extraVolumeMounts }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{/* What kube-score shall not ask for:
     user-group-id      1000 is the user of the official images, and the server's files are its own
     resources          no CPU limit: a throttled server loses its shards (memory has limits, a test sees to it)
     image-pull-policy  tags are versions; a node that has the image needs no registry to restart a pod
     budget, replicas   one replica is the default, and its budget lets it be away */}}
{{- define "trellis-temporal.kubeScore" -}}
kube-score/ignore: >-
  container-security-context-user-group-id,container-resources,container-image-pull-policy,
  deployment-has-poddisruptionbudget,deployment-replicas
{{- end }}
