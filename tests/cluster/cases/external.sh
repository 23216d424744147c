# shellcheck shell=bash
# PostgreSQL and Temporal that are there already: in another namespace, as releases of their own, and the product with
# values-external.yaml, in which only addresses, and what those servers do not offer (TLS, keys), are others.

namespace product
product=$NS
namespace servers
servers=$NS
clients() { # who may call those servers: Temporal its database, and the product's namespace both
  echo "networkPolicy.extraIngress=[{\"podSelector\": {\"matchLabels\": {\"app.kubernetes.io/instance\": \"flow\"}}},
    {\"namespaceSelector\": {\"matchLabels\": {\"kubernetes.io/metadata.name\": \"$product\"}}}]"
}
began=$(seconds)
helm install data "$CHART/charts/postgresql" --namespace "$servers" --set-json "$(clients)" >/dev/null || fail "helm install of PostgreSQL"
helm install flow "$CHART/charts/temporal" --namespace "$servers" --set-json "$(clients)" \
  --set database.host=data-postgresql,database.existingSecret=data-postgresql,database.tls.enabled=false --wait --timeout 8m >"$WORK/servers" 2>&1 ||
  { cat "$WORK/servers"; fail "helm install of Temporal"; }
say "PostgreSQL and Temporal as releases of their own: $(since "$began") s"

password() { k get secret data-postgresql --output "jsonpath={.data.$1}" | base64 --decode; }
app=$(password app-password) migrate=$(password migrate-password)
NS=$product
# By the names that values-external.yaml gives them.
k create secret generic trellis-db-app --from-literal "password=$app" >/dev/null
k create secret generic trellis-db-migrate --from-literal "password=$migrate" >/dev/null
install --values charts/trellis/values-external.yaml \
  --set "database.host=data-postgresql.$servers.svc,database.sslMode=disable,database.caSecret=" \
  --set "temporalClient.address=flow-temporal-frontend.$servers.svc:7233,temporalClient.namespace=default" \
  --set temporalClient.tls.enabled=false,temporalClient.apiKey.existingSecret= \
  --set partners.payment.url=,partners.payment.existingSecret=,partners.carrier.url=,partners.carrier.existingSecret= \
  --set-json "networkPolicy={\"postgresqlTo\": [{\"namespaceSelector\": {\"matchLabels\": {\"kubernetes.io/metadata.name\": \"$servers\"}}}],
    \"temporalTo\": [{\"namespaceSelector\": {\"matchLabels\": {\"kubernetes.io/metadata.name\": \"$servers\"}}}]}"
equal "$(k get pods --selector 'app.kubernetes.io/name in (postgresql, temporal)' --output name)" '' "servers beside the product"
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test"; }
say "helm test: $(grep '^Phase:' "$WORK/test")"
forward
demo 20 --mix --concurrency 4 >"$WORK/demo" || { cat "$WORK/demo"; fail "orders on external servers"; }
say "$(tail -n 1 "$WORK/demo")"
DATABASE="$servers data-postgresql-0" books_clean
stop_forwards
remove_namespace "$product"
remove_namespace "$servers"
