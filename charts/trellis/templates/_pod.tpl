{{/* The parts of a pod that all of the product's have in common. Each takes a dict:
     root       $
     component  api, worker, migrate, …
     options    `podDefaults`, with what goes before it
     labels     more labels, optional
     postgresql "app", "migrate", or nothing: no PostgreSQL
     temporal   true: Temporal
     partners   true: the payment provider and the carrier, so their credentials
     serves     true: runs as replicas and has metrics */}}

{{- define "trellis.podMetadata" -}}
{{- /* Those that are given replace none of the chart's, which selectors go by. */ -}}
{{- $own := merge (include "trellis.labels" . | fromYaml) (.labels | default dict) (ternary (dict "trellis.dev/metrics" "true") dict (.serves | default false)) -}}
labels:
  {{- merge $own (deepCopy (.options.podLabels | default dict)) | toYaml | nindent 2 }}
annotations:
  # Changed settings and passwords of the chart's own make new pods.
  checksum/config: {{ include "trellis.configChecksum" .root }}
  {{- with .root.Values.metrics }}
  {{- if and $.serves .annotations (not .podMonitor.enabled) (not .serviceMonitor.enabled) }}
  prometheus.io/scrape: "true"
  prometheus.io/port: "9464"
  prometheus.io/path: /metrics
  {{- end }}
  {{- end }}
  {{- with .options.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "trellis.podSpec" -}}
{{- $options := .options -}}
serviceAccountName: {{ include "trellis.serviceAccountName" .root }}
automountServiceAccountToken: false
# Those of a Service `trellis-api` would look like the setting TRELLIS_API_PORT.
enableServiceLinks: false
{{- include "trellis.pullSecrets" .root | nindent 0 }}
securityContext:
  {{- include "trellis.podSecurity" (dict "root" .root "context" $options.podSecurityContext) | nindent 2 }}
{{- include "trellis.podOptions" $options }}
{{- if and .serves $options.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- $selector := dict "matchLabels" (merge (include "trellis.selector" . | fromYaml) (.labels | default dict)) }}
  {{- range $options.topologySpreadConstraints }}
  - {{ merge (deepCopy .) (dict "labelSelector" $selector "matchLabelKeys" (list "pod-template-hash")) | toYaml | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- with $options.extraInitContainers }}
initContainers: {{ toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 64Mi}
  {{- range include "trellis.secretVolumes" . | fromYamlArray }}
  - name: {{ .name }}
    projected: {sources: {{ .sources | toJson }}}
  {{- end }}
  {{- with $options.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "trellis.container" -}}
{{- $v := .root.Values -}}
image: {{ include "trellis.image" .root }}
imagePullPolicy: {{ $v.image.pullPolicy }}
securityContext: {{ toYaml .options.containerSecurityContext | nindent 2 }}
envFrom:
  - configMapRef: {name: {{ include "trellis.fullname" .root }}}
{{- with include "trellis.env" . | trim }}
{{- include "trellis.once" (. | fromYamlArray) }}
env:
  {{- . | nindent 2 }}
{{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- range include "trellis.secretVolumes" . | fromYamlArray }}
  - {name: {{ .name }}, mountPath: /etc/trellis/{{ .name }}, readOnly: true}
  {{- end }}
  {{- with .options.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Kubernetes takes a variable that is there twice from one who creates, and not from one who applies. (the list of env) */}}
{{- define "trellis.once" -}}
{{- $seen := dict -}}
{{- range . -}}
  {{- if hasKey $seen .name -}}
    {{- fail (printf "the environment variable %s is there twice: leave it out of extraEnv, or have it once there" .name) -}}
  {{- end -}}
  {{- $_ := set $seen .name true -}}
{{- end -}}
{{- end }}

{{- define "trellis.env" -}}
{{- $v := .root.Values -}}
{{- with .postgresql }}
{{- include "trellis.databaseEnv" (dict "root" $.root "role" .) | nindent 0 }}
{{- end }}
{{- if and .temporal (include "trellis.apiKeySecret" .root) }}
- name: TRELLIS_TEMPORAL_API_KEY
  valueFrom: {secretKeyRef: {name: {{ include "trellis.apiKeySecret" .root }}, key: {{ $v.temporalClient.apiKey.key }}}}
{{- end }}
{{- if .partners }}
{{- include "trellis.partnersEnv" $v.partners | nindent 0 }}
{{- end }}
{{- if $v.otel.endpoint }}
{{- with $v.otel.headersSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $v.otel.headersKey }}}}
{{- end }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: k8s.namespace.name={{ .root.Release.Namespace }},k8s.pod.name=$(POD_NAME),service.version={{ include "trellis.version" .root }}
{{- end }}
{{- with .env }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- with .options.extraEnv }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{/* CAs, certificates, passwords and tokens, as a list of {name, sources}; each is mounted at /etc/trellis/<name>. */}}
{{- define "trellis.secretVolumes" -}}
{{- if .postgresql }}
{{- $database := .root.Values.database -}}
{{- $login := include "trellis.databaseLogin" (dict "root" .root "role" .postgresql) | fromJson -}}
{{- if or $database.caSecret (not $login.urlKey) }}
- name: postgresql
  sources:
    {{- with $database.caSecret }}
    - secret: {name: {{ . }}, items: [{key: {{ $database.caKey }}, path: {{ $database.caKey }}}]}
    {{- end }}
    {{- if not $login.urlKey }}
    - secret: {name: {{ $login.secret }}, items: [{key: {{ $login.passwordKey }}, path: password}]}
    {{- end }}
{{- end }}
{{- end }}
{{- if .temporal }}
{{- include "trellis.credentials" (list "temporal" (dict "tls" .root.Values.temporalClient.tls)) }}
{{- end }}
{{- if .partners }}
{{- include "trellis.credentials" (list "payment" .root.Values.partners.payment) }}
{{- include "trellis.credentials" (list "carrier" .root.Values.partners.carrier) }}
{{- end }}
{{- end }}

{{/* A CA, a client's certificate and a token in one volume. (list NAME OPTIONS) */}}
{{- define "trellis.credentials" -}}
{{- $tls := (last .).tls -}}
{{- $token := (last .).existingSecret | default "" -}}
{{- if or $tls.caSecret $tls.certSecret $token }}
- name: {{ first . }}
  sources:
    {{- with $tls.caSecret }}
    - secret: {name: {{ . }}, items: [{key: {{ $tls.caKey }}, path: ca.crt}]}
    {{- end }}
    {{- with $tls.certSecret }}
    - secret: {name: {{ . }}, items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]}
    {{- end }}
    {{- with $token }}
    - secret: {name: {{ . }}, items: [{key: {{ (last $).tokenKey }}, path: token}]}
    {{- end }}
{{- end }}
{{- end }}

{{- define "trellis.configChecksum" -}}
{{- $rendered := "" -}}
{{- range list "configmap" "secret-database" "secret-temporal" -}}
{{- $rendered = print $rendered (include (print $.Template.BasePath "/config/" . ".yaml") $) -}}
{{- end -}}
{{ sha256sum $rendered }}
{{- end }}

{{/* For kube-score, which would have a CPU limit, though throttling costs more than a busy neighbour, and images pulled at each start,
     though a tag or digest that never moves needs it once. */}}
{{- define "trellis.scoreAnnotations" -}}
kube-score/ignore: container-resources,container-image-pull-policy
{{- end }}
