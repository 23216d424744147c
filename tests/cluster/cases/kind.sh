# shellcheck shell=bash
# `kind create cluster` with kind-config.yaml, the image and the chart on it, and the API at the port that the file maps.

over() { # over COMMAND…: what takes the cluster down, once it was looked at
  local code=$?
  trap - EXIT
  ((code == 0)) || evidence default || true
  "$@"
  exit "$code"
}
if [ -x "${CLUSTER_KIT:-}" ]; then
  [ -n "${CLUSTER_KIT_INSTALLED:-}" ] || "$CLUSTER_KIT" install docker kind
  trap 'over "$CLUSTER_KIT" kind down' EXIT
  began=$(seconds)
  "$CLUSTER_KIT" kind up --config kind-config.yaml || fail "kind create cluster --config kind-config.yaml"
  say "kind create cluster: $(since "$began") s"
  began=$(seconds)
  "$CLUSTER_KIT" build trellis:test "$WORK/clone" --save "$WORK/image.tar" >"$WORK/build.log" 2>&1 || { cat "$WORK/build.log"; fail build; }
  "$CLUSTER_KIT" kind load
  "$CLUSTER_KIT" kind load "$WORK/image.tar"
  eval "$("$CLUSTER_KIT" kind env)"
elif command -v kind >/dev/null && docker info >/dev/null 2>&1; then
  export KUBECONFIG=$WORK/kind.kubeconfig
  trap 'over kind delete cluster --name "$PREFIX"' EXIT
  began=$(seconds)
  kind create cluster --name "$PREFIX" --config kind-config.yaml --wait 180s || fail "kind create cluster --config kind-config.yaml"
  say "kind create cluster: $(since "$began") s"
  began=$(seconds)
  docker build --quiet --tag trellis:test . >/dev/null
  kind load docker-image --name "$PREFIX" trellis:test
else
  skip "kind-config.yaml WAS NOT TESTED: neither kind and Docker, nor CLUSTER_KIT"
  return 0
fi
say "images are on the node: $(since "$began") s"

# As `make deploy` does it.
# shellcheck disable=SC2034 # of lib.sh
IMAGE=trellis:test NS=default
install --values charts/trellis/values-dev.yaml
port=$(sed -n 's/.*hostPort: \([0-9]*\).*/\1/p' kind-config.yaml)
export API=http://localhost:$port
until_true 30 "the API does not answer at $API, the port that kind-config.yaml maps" api_answers
start_order kind-1 pay-kind-1
approve kind-1
until_step kind-1 shipped
say "an order is shipped through $API"
