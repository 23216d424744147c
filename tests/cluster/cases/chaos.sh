# shellcheck shell=bash
# Any pod goes at any moment, by force or politely, alone or with all others: orders go on, nobody is charged twice.

shared
forward
more_orders() { (($(sql 'SELECT count(*) FROM orders') > $1)); }
disturbed() { # disturbed NAME COMMAND…: while twenty orders of every kind are on their way
  local demo began before what=$1
  shift
  before=$(sql 'SELECT count(*) FROM orders')
  demo 20 --mix --concurrency 4 --patience 300 >"$WORK/demo" 2>&1 &
  demo=$!
  until_true 60 "no order begins, before: $what" more_orders "$before"
  began=$(seconds)
  "$@" >"$WORK/disturbed" 2>&1 || { cat "$WORK/disturbed"; fail "$what"; }
  wait "$demo" || { cat "$WORK/demo"; fail "orders after: $what"; }
  say "$what: $(tail -n 1 "$WORK/demo")"
  # Not by `kubectl wait` for pods, which also waits for those that are on their way out.
  k rollout status deployments,statefulsets --timeout 180s >"$WORK/ready" 2>&1 ||
    { cat "$WORK/ready"; fail "not everything is ready again after: $what"; }
  say "everything ready again $(since "$began") s later"
}
attempts() { sql "SELECT count(*) FROM events WHERE order_id LIKE '$1' AND type = 'attempt_retried'"; }
# The provider takes 3 s for each, and a worker that is killed "by force" still has 2 s to finish: so they are approved
# quickly, one after the other, beginning before the command and ending after it.
in_mid_charge() { # in_mid_charge PREFIX COMMAND…: while forty orders are being charged, some of them just then
  local prefix=$1 approving
  shift
  orders start "$prefix" 40 --payment pay-slow
  orders wait "$prefix" 40 --step awaiting_review
  (
    for number in {1..40}; do
      approve "$prefix-$number"
      sleep 0.1
    done
  ) &
  approving=$!
  until_true 60 "none of them gets to charging" some_are_charging "$prefix"
  "$@" >/dev/null 2>&1
  wait "$approving" || fail "approvals while: $*"
  orders wait "$prefix" 40
}

# By force: the attempts are lost with the worker, and repeated when their 40 s are up; the provider knows the keys.
in_mid_charge "killed-$RUN" k delete pod --selector trellis.dev/task-queue=default --grace-period 0 --force --wait=false
killed=$(attempts "killed-$RUN-%")
say "attempts that were cut off and repeated: $killed"
((killed > 0)) || fail "no charge was cut off, so this proved nothing"
# Politely: what has begun is finished within the grace period.
in_mid_charge "stopped-$RUN" k delete pod --selector trellis.dev/task-queue=default --wait=false
equal "$(attempts "stopped-$RUN-%")" 0 "attempts that a polite stop cut off"

disturbed "the shipping workers" k delete pod --selector trellis.dev/task-queue=shipping-tq
disturbed "the API" k delete pod --selector app.kubernetes.io/name=trellis,app.kubernetes.io/component=api
disturbed "Temporal" k delete pod --selector app.kubernetes.io/name=temporal
disturbed "PostgreSQL" k delete pod --selector app.kubernetes.io/name=postgresql

evict() { # evict POD: as a drain does, which waits for the disruption budgets; 404: it has gone by itself
  local answer
  until answer=$(echo '{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "'"$1"'"}}' |
    kubectl create --raw "/api/v1/namespaces/$NS/pods/$1/eviction" --filename - 2>&1); do
    [[ $answer != *NotFound* && $answer != *"not found"* ]] || return 0
    [[ $answer = *"disruption budget"* ]] || { echo "$answer"; return 1; }
    ((SECONDS < evictions_end)) || { echo "$1 is not let go: $answer"; return 1; }
    sleep 1
  done
}
drain() { # every pod that is there now, all at once; the node itself stays, being the only one
  local pod evictions=()
  evictions_end=$((SECONDS + 240))
  for pod in $(k get pods --field-selector status.phase=Running --output jsonpath='{.items[*].metadata.name}'); do
    evict "$pod" &
    evictions+=("$!")
  done
  for pod in "${evictions[@]}"; do wait "$pod" || return 1; done
}
disturbed "all pods, as a drain evicts them" drain
books_clean
