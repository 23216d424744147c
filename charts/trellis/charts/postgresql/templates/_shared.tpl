{{/* What PostgreSQL, Temporal and the product name and say alike. The same file in all three charts, since each can be rendered alone. */}}

{{/* A name as Services take it: letters, digits and -, a letter first, of at most so many characters. What has to be changed for that
     gets the beginning of its hash, so that two names never become the same one. (list NAME LENGTH) */}}
{{- define "trellis.dnsName" -}}
{{- $given := first . -}}
{{- $name := regexReplaceAll "[^a-z0-9]+" (lower $given) "-" | trimAll "-" -}}
{{- if not (regexMatch "^[a-z]" $name) -}}
{{- $name = printf "r-%s" $name -}}
{{- end -}}
{{- /* Also -- in the middle is a name that Kubernetes takes. */}}
{{- $valid := regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $given -}}
{{- if and $valid (le (len $given) (last .)) -}}
{{ $given }}
{{- else -}}
{{ $name | trunc (sub (last .) 7 | int) | trimAll "-" }}-{{ $given | sha256sum | trunc 6 }}
{{- end -}}
{{- end }}

{{/* The product's name in the chart that has it as a dependency, which is its alias where there is one; nothing where Helm installs the
     product itself. Only the path of a template tells its subcharts so. */}}
{{- define "trellis.owner" -}}
{{- $path := .Template.BasePath | splitList "/" | initial -}}
{{- if has .Chart.Name (list "postgresql" "temporal") -}}
{{- $path = slice $path 0 (max 0 (sub (len $path) 2) | int) -}}
{{- end -}}
{{- if gt (len $path) 1 -}}
{{ last $path }}
{{- end -}}
{{- end }}

{{/* The label by which the pods of one installation know each other: two aliases in one release are two. */}}
{{- define "trellis.instance" -}}
{{- with include "trellis.owner" . -}}
{{ include "trellis.dnsName" (list (printf "%s-%s" $.Release.Name .) 63) }}
{{- else -}}
{{ .Release.Name }}
{{- end -}}
{{- end }}

{{/* What the names of PostgreSQL and Temporal begin with. */}}
{{- define "trellis.serversName" -}}
{{- $given := dig "trellis" "fullnameOverride" "" (.Values.global | default dict) -}}
{{- $owner := include "trellis.owner" . -}}
{{ include "trellis.dnsName" (list ($given | default (list .Release.Name $owner | compact | join "-")) 36) }}
{{- end }}

{{/* How Kubernetes is to give addresses to a Service. (dict "root" $ "own" {…}: what goes before the global values) */}}
{{- define "trellis.addressFamilies" -}}
{{- $own := .own | default dict -}}
{{- $global := .root.Values.global | default dict -}}
{{- with $own.ipFamilyPolicy | default (get $global "ipFamilyPolicy") }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with $own.ipFamilies | default (get $global "ipFamilies") }}
ipFamilies: {{ toJson . }}
{{- end }}
{{- end }}

{{/* An image's repository, in the registry for all of them unless it names one itself. (dict "root" $ "repository" …) */}}
{{- define "trellis.repository" -}}
{{- $registry := dig "imageRegistry" "" (.root.Values.global | default dict) -}}
{{- $named := and (contains "/" .repository) (regexMatch "[.:]|^localhost$" (splitList "/" .repository | first)) -}}
{{ ternary (printf "%s/%s" (trimSuffix "/" $registry) .repository) .repository (and (ne $registry "") (not $named)) }}
{{- end }}

{{/* Names, or objects as in a pod, as an umbrella chart may have either. ($) */}}
{{- define "trellis.pullSecrets" -}}
{{- with dig "imagePullSecrets" list (.Values.global | default dict) -}}
imagePullSecrets:
  {{- range . }}
  - {name: {{ kindIs "string" . | ternary . (get (kindIs "string" . | ternary dict .) "name") }}}
  {{- end }}
{{- end }}
{{- end }}

{{/* A pod's security context, without the ids where the platform chooses them. (dict "root" $ "context" {…}) */}}
{{- define "trellis.podSecurity" -}}
{{- $platform := dig "trellis" "arbitraryIds" false (.root.Values.global | default dict) -}}
{{- range $key, $value := .context }}
{{- if not (and $platform (has $key (list "runAsUser" "runAsGroup" "fsGroup"))) }}
{{ $key }}: {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}

{{/* What is put into a pod as it is given. (the values that may have it) */}}
{{- define "trellis.podOptions" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "schedulerName" "runtimeClassName" "dnsPolicy" "dnsConfig" "hostAliases" }}
{{- with get $ $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}
