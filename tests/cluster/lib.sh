# shellcheck shell=bash
# What the cases share. Sourced by tests/cluster/run, which sets WORK, PREFIX, RUN, CHART, IMAGE, PYTHON
# and the repository's place.

SUITE=cluster
# shellcheck source=tests/lib.sh
source "$repository/tests/lib.sh"

skip() { # what could not be tested here, once more in the last lines of the run
  say "SKIPPED, $*"
  echo "$*" >>"$WORK/skipped"
}

# --- namespaces

k() { kubectl --namespace "$NS" "$@"; }

namespace() { # namespace NAME [LABEL…]: a fresh one, for this run alone; `end` in tests/cluster/run removes it
  NS=$PREFIX-$1
  namespace_gone "$NS" || remove_namespace "$NS" # of a run that was kept
  kubectl create namespace "$NS" >/dev/null
  kubectl label namespace "$NS" "trellis.dev/test=$PREFIX" "${@:2}" >/dev/null
}
namespace_gone() { ! kubectl get namespace "$1" >/dev/null 2>&1; }
remove_namespace() {
  local namespace=$1
  kubectl delete namespace "$namespace" --wait=false >/dev/null
  until_true 240 "the namespace $namespace does not go" namespace_gone "$namespace"
}
namespaces() { kubectl get namespaces --selector "trellis.dev/test=$PREFIX" --output name 2>/dev/null | sed 's,.*/,,'; }

evidence() { # what a namespace looks like at the moment of a failure
  local NS=$1 pod
  say "--- $NS: pods, then events, then the last lines of every container"
  k get pods --output wide
  k get events --sort-by=.lastTimestamp --output custom-columns=AT:.lastTimestamp,KIND:.involvedObject.kind,NAME:.involvedObject.name,REASON:.reason,MESSAGE:.message | tail -n 30 | cut -c 1-260
  for pod in $(k get pods --output name); do
    say "$pod"
    k logs "$pod" --all-containers --prefix=false --tail 8 2>&1 | cut -c 1-300
    k logs "$pod" --all-containers --previous --tail 4 2>/dev/null | cut -c 1-300 || true
  done
}

# --- the product

# The image, and requests for a small node; everything else is the chart's own.
VALUES=$here/values.yaml
install() { # install [HELM_ARGUMENT…]: the product as the release `trellis`, from nothing
  local began
  began=$(seconds)
  helm install trellis "$CHART" --namespace "$NS" --values "$VALUES" --set "image.repository=${IMAGE%:*},image.tag=${IMAGE##*:}" \
    --wait --timeout 8m "$@" >"$WORK/install.log" 2>&1 || {
    tail -n 20 "$WORK/install.log"
    fail "helm install in $NS"
  }
  say "helm install --wait: $(since "$began") s"
}
upgrade() { # upgrade IMAGE [HELM_ARGUMENT…]: to that image and this chart, with the values that were given before
  local began
  began=$(seconds)
  helm upgrade trellis "$CHART" --namespace "$NS" --reset-then-reuse-values --set "image.repository=${1%:*},image.tag=${1##*:}" \
    --wait --timeout 8m "${@:2}" >"$WORK/upgrade.log" 2>&1 || {
    tail -n 20 "$WORK/upgrade.log"
    fail "helm upgrade in $NS"
  }
  say "helm upgrade --wait: $(since "$began") s"
}

roll_back() { # to the revision before
  local began
  began=$(seconds)
  helm rollback trellis --namespace "$NS" --wait --timeout 8m >"$WORK/rollback" 2>&1 || { cat "$WORK/rollback"; fail "helm rollback in $NS"; }
  say "helm rollback --wait: $(since "$began") s"
}

shared() { # [HELM_ARGUMENT…]: the installation that several cases use: in a namespace that enforces Pod Security `restricted`
  NS=$PREFIX-shared
  if namespace_gone "$NS"; then
    namespace shared pod-security.kubernetes.io/enforce=restricted pod-security.kubernetes.io/enforce-version=latest
    install "$@"
  fi
}

forward() { # forward: keep API an address of svc/trellis-api, through everything that happens to its pods
  local port
  port=$(free_port)
  export API=http://127.0.0.1:$port
  (
    trap 'kill "$child" 2>/dev/null; exit 0' TERM
    # `port-forward` is bound to the pod it found. Mostly it ends with it; where it stays instead, it is ended here.
    while :; do
      k port-forward --address 127.0.0.1 svc/trellis-api "$port:8000" >/dev/null 2>&1 &
      child=$! silent=0
      while sleep 1 && kill -0 "$child" 2>/dev/null && ((silent < 3)); do
        if api_answers /healthz; then silent=0; else silent=$((silent + 1)); fi
      done
      kill "$child" 2>/dev/null || true
    done
  ) &
  forwards+=("$!")
  until_true 30 "svc/trellis-api does not answer through port-forward" api_answers
}
api_answers() { curl -sS --fail --max-time 5 -o /dev/null "$API${1:-/readyz}" 2>/dev/null; } # api_answers [PATH]
stop_forwards() { ((${#forwards[@]} == 0)) || kill "${forwards[@]}" 2>/dev/null || true; }

# --- orders

orders() { # see drive.py
  local said=$WORK/orders.$BASHPID
  "$PYTHON" -m tests.cluster.drive --url "$API" "$@" 2>"$said" || {
    cat "$said"
    fail "orders $*: $(tail -n 1 "$said")"
  }
}
demo() { "$TRELLIS" demo --url "$API" "$@"; }

# --- the books

DATABASE=           # "NAMESPACE POD", if it is not that of the release
sql() {
  local namespace pod
  read -r namespace pod <<<"${DATABASE:-$NS trellis-postgresql-0}"
  kubectl --namespace "$namespace" exec "$pod" -- psql --username postgres --dbname trellis --tuples-only --no-align --command "$1"
}
in_state() { sql "SELECT count(*) FROM orders WHERE state = '$1' AND id LIKE '$2-%'"; } # in_state STATE PREFIX
some_are_charging() { (($(in_state charging "$1") > 0)); }
books_clean() {
  equal "$(sql 'SELECT count(*) FROM (SELECT FROM sandbox.charges GROUP BY payment HAVING count(*) > 1) AS twice')" 0 \
    "payments charged twice in the provider's books"
  k exec deploy/trellis-api -- trellis audit --settle 0 >"$WORK/audit" 2>&1 || {
    cat "$WORK/audit"
    fail "trellis audit"
  }
  say "trellis audit: $(tail -n 1 "$WORK/audit")"
}

# --- what several cases do

# The lines that `helm install` prints: the port-forward, then the published calls. Only the port is another.
contract_of_the_notes() {
  local port line forwarding order
  port=$(free_port)
  helm get notes trellis --namespace "$NS" >"$WORK/notes"
  forwarding=$(grep -E '^ *kubectl .*port-forward .*8000' "$WORK/notes" | head -n 1 | sed -E "s/ 8000(:8000)?$/ $port:8000/")
  [ -n "$forwarding" ] || { cat "$WORK/notes"; fail "the notes show no port-forward"; }
  say "${forwarding#"${forwarding%%[! ]*}"}"
  eval "exec $forwarding" >"$WORK/forwarding" 2>&1 &
  forwards+=("$!")
  export API=http://127.0.0.1:$port
  because="cat $WORK/forwarding" until_true 30 "the port-forward of the notes does not answer" api_answers
  equal "$(grep -c -E '^ *curl ' "$WORK/notes")" 3 "calls in the notes"
  order=$(sed -n 's,^ *curl .*/orders/\(.*\)/status.*,\1,p' "$WORK/notes")
  while read -r line; do
    [[ $line != *"/status"* ]] || until_step "$order" shipped
    say "$line"
    eval "${line//:8000/:$port} -sS --fail-with-body" </dev/null || fail "that call"
    echo
  done < <(grep -E '^ *curl ' "$WORK/notes")
}
