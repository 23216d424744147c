# shellcheck shell=bash
# The chart with the neighbours of `k8s/base`, and a mix of orders: Prometheus answers every query of every panel and rule, its
# counts are PostgreSQL's, and Jaeger has the whole trace of every order.
#
# TEST_MIX_MINUTES (3) is how long orders come in. Ten are enough for every rate; with less, those over longer spans see a part.

minutes=${TEST_MIX_MINUTES:-3}
neighbours=$WORK/clone/k8s/base
kubectl apply --kustomize "$neighbours" >"$WORK/neighbours" 2>&1 || { cat "$WORK/neighbours"; fail "kubectl apply -k k8s/base"; }
kubectl label namespace observability "trellis.dev/test=$PREFIX" --overwrite >/dev/null
for name in collector jaeger prometheus; do
  kubectl --namespace observability rollout status "deployment/$name" --timeout 180s >"$WORK/rollout" 2>&1 ||
    { cat "$WORK/rollout"; fail "$name does not come up"; }
done
say "collector, Jaeger and Prometheus are up"

namespace seen
install --set otel.endpoint=http://collector.observability:4317
forward
began=$SECONDS
"$TRELLIS" load --url "$API" --rate 1 --duration $((minutes * 60)) --seed 8 || fail "an order of the mix did not end as it should"
# Twice the scrape interval, and the batches of spans.
sleep 40

open() { # open NAMESPACE TARGET PORT: forward it from the port $opened
  local port
  port=$(free_port)
  kubectl --namespace "$1" port-forward --address 127.0.0.1 "$2" "$port:$3" >/dev/null 2>&1 &
  forwards+=("$!")
  opened=$port
}
open observability svc/prometheus 9090 && prometheus=http://127.0.0.1:$opened
open observability svc/jaeger 16686 && jaeger=http://127.0.0.1:$opened
open "$NS" svc/trellis-postgresql 5432 && database=postgresql://trellis_app@127.0.0.1:$opened/trellis
PGPASSWORD=$(k get secret trellis-postgresql --output 'jsonpath={.data.app-password}' | base64 --decode)
export PGPASSWORD
answers() { curl -sS --fail --max-time 5 --output /dev/null "$1" 2>/dev/null; }
until_true 30 "Prometheus does not answer" answers "$prometheus/-/ready"
until_true 30 "Jaeger does not answer" answers "$jaeger/api/services"

# From before the first order, so that nothing is under way at the beginning.
"$PYTHON" -m tests.queries --prometheus "$prometheus" --database-url "$database" --namespace "$NS" --since $(((SECONDS - began) / 60 + 1)) \
  >"$WORK/queries" 2>&1 || { cat "$WORK/queries"; fail "the queries"; }
tail -n 12 "$WORK/queries"
"$PYTHON" -m tests.traces --api "$API" --jaeger "$jaeger" >"$WORK/traces" 2>&1 || { tail -n 40 "$WORK/traces"; fail "the traces"; }
tail -n 1 "$WORK/traces"
unset PGPASSWORD
books_clean
stop_forwards
kubectl delete --kustomize "$neighbours" --wait=false >/dev/null
remove_namespace "$NS"
