# shellcheck shell=bash
# The profile `observability`: an order's trace arrives in Jaeger, its metrics in Prometheus.

images=$(compose config --format json | json '" ".join(d["services"][n]["image"] for n in ("collector", "jaeger", "prometheus"))')
for image in $images; do
  if ! docker image inspect "$image" >/dev/null 2>&1 && ! docker pull --quiet "$image" >/dev/null 2>&1; then
    say "SKIPPED, THE PROFILE observability WAS NOT TESTED: $image cannot be had here"
    return 0
  fi
done
export OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317
docker compose --profile observability up --wait --detach 2>/dev/null || fail "up of the profile"
start_order seen-1 pay-seen-1
until_step seen-1 awaiting_review
approve seen-1
until_step seen-1 shipped

prometheus() {
  curl -sS --get "http://localhost:$PROMETHEUS_PORT/api/v1/query" --data-urlencode "query=$1" |
    json 'sum(float(r["value"][1]) for r in d["data"]["result"])'
}
traced() { curl -sS "http://localhost:$JAEGER_PORT/api/services" | grep -q '"trellis"'; }
scraped() { [ "$(prometheus 'trellis_orders_closed_total{step="shipped"}' 2>/dev/null)" != 0 ]; }
until_true 30 "Jaeger has no trace of trellis" traced
until_true 60 "Prometheus has no trellis_orders_closed_total" scraped
equal "$(prometheus 'count(up == 0) or vector(0)' )" 0.0 "targets that are down"
say "targets that are up: $(prometheus 'count(up)')"
operations=$(curl -sS "http://localhost:$JAEGER_PORT/api/traces?service=trellis&limit=20" |
  json 'sorted({s["operationName"] for t in d["data"] for s in t["spans"]})')
say "spans: $operations"
for name in StartWorkflow:OrderWorkflow RunActivity:charge RunActivity:dispatch; do
  [[ $operations = *"'$name'"* ]] || fail "Jaeger has no span $name"
done
compose rm --force --stop collector jaeger prometheus >/dev/null 2>&1
unset OTEL_EXPORTER_OTLP_ENDPOINT
compose up --wait --detach trellis_app 2>/dev/null
