# shellcheck shell=bash
# The product twice in one release, as aliases of an umbrella chart, and once more beside it in the same namespace: three installations
# that know nothing of each other.

namespace umbrella
umbrella=$WORK/umbrella
mkdir -p "$umbrella/charts"
cp -r "$CHART" "$umbrella/charts/trellis"
one="{image: {repository: ${IMAGE%:*}, tag: ${IMAGE##*:}}, sandbox: {enabled: true}, api: {replicas: 1, resources: {requests: {cpu: 20m}}},
  workerDefaults: {replicas: 1, resources: {requests: {cpu: 20m}}}, jobs: {resources: {requests: {cpu: 20m}}},
  postgresql: {resources: {requests: {cpu: 50m}}}, temporal: {server: {resources: {requests: {cpu: 50m}}}, ui: {enabled: false}}}"
echo "{apiVersion: v2, name: umbrella, version: 1.0.0, dependencies: [{name: trellis, version: '*', alias: east}, {name: trellis, version: '*', alias: west}]}" \
  >"$umbrella/Chart.yaml"
printf 'east: %s\nwest: %s\n' "$one" "$one" >"$umbrella/values.yaml"
printf '%s\n' "$one" >"$WORK/one.yaml"

began=$(seconds)
helm install shop "$umbrella" --namespace "$NS" --wait --timeout 8m >"$WORK/umbrella.log" 2>&1 || { cat "$WORK/umbrella.log"; fail "helm install of the umbrella"; }
say "helm install --wait of both aliases: $(since "$began") s"
VALUES=$WORK/one.yaml install
for release in shop trellis; do
  helm test "$release" --namespace "$NS" --timeout 4m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test $release"; }
done
# One order each, by `helm test`, and none in another's books.
for database in shop-east-postgresql-0 shop-west-postgresql-0 trellis-postgresql-0; do
  equal "$(DATABASE="$NS $database" sql 'SELECT count(*) FROM orders')" 1 "orders in $database"
done
remove_namespace "$NS"
