# shellcheck shell=bash
# Who reaches what: the same program in pods that differ by their labels and namespaces only.

shared
product=$NS
ask() { # ask NAME LABELS ADDRESS…: start a pod with these labels that tries each address
  local name=$1 labels=$2
  shift 2
  cat >"$WORK/pod.yaml" <<POD
apiVersion: v1
kind: Pod
metadata: {name: $name, labels: {$labels}}
spec:
  restartPolicy: Never
  # As everywhere beside the product: the links to its Services would read as its settings.
  enableServiceLinks: false
  automountServiceAccountToken: false
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: probe
      image: $IMAGE
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      command: [python, -c]
      args:
        - |
          import socket, sys, time
          from concurrent.futures import ThreadPoolExecutor

          def found(address, end=time.monotonic() + 6):
              host, port = address.rsplit(":", 1)
              # Whoever enforces the policies has to hear of this pod first: what is found in the end counts.
              while True:
                  try:
                      socket.create_connection((host, int(port)), timeout=2).close()
                      state = "open"
                  except OSError:
                      state = "closed"
                  if time.monotonic() > end:
                      return state
                  time.sleep(0.3)

          print(*ThreadPoolExecutor(8).map(found, sys.argv[1:]))
$(printf '        - "%s"\n' "$@")
POD
  k apply --filename "$WORK/pod.yaml" >/dev/null
}
told() { # told NAME EXPECTED WHAT: "open" or "closed" for each of its addresses
  k wait --for=jsonpath='{.status.phase}'=Succeeded "pod/$1" --timeout 120s >/dev/null || fail "the probe $1 does not end"
  equal "$(k logs "$1")" "$2" "$3"
  k delete pod "$1" --wait=false >/dev/null
}
address() { kubectl --namespace "$product" get pods --selector "$1" --field-selector status.phase=Running --output jsonpath='{.items[0].status.podIP}'; }

services=("trellis-postgresql.$product:5432" "trellis-temporal-frontend.$product:7233")
metrics=("$(address app.kubernetes.io/component=worker):9464" "$(address app.kubernetes.io/component=api):9464"
  "$(address app.kubernetes.io/name=temporal,app.kubernetes.io/component=server):9090")
api=trellis-api.$product:8000
all=("$api" "${services[@]}" "${metrics[@]}")

worker='app.kubernetes.io/name: trellis, app.kubernetes.io/instance: trellis, app.kubernetes.io/component: worker'
nobody="closed closed closed closed closed closed"

namespace outside
# First of all whether anything is enforced on this cluster: a policy of ours lets nothing out of this namespace.
cat <<'POLICY' | k apply --filename - >/dev/null
{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "nothing-out"},
 "spec": {"podSelector": {"matchLabels": {"app": "shut-in"}}, "policyTypes": ["Egress"], "egress": []}}
POLICY
ask shut-in 'app: shut-in' "$(address app.kubernetes.io/component=api):8000"
ask stranger 'app: stranger' "${all[@]}"
ask prometheus 'app.kubernetes.io/name: prometheus' "${all[@]}"
ask impostor "$worker" "${all[@]}"
if ! (told shut-in closed "a pod that our own policy lets nothing out of, to the API"); then
  skip "THE NETWORK POLICIES WERE NOT TESTED: this cluster does not enforce any"
  return 0
fi
told stranger "$nobody" "a stranger of another namespace, to API, PostgreSQL, Temporal, three metrics"
told prometheus "$nobody" "what calls itself Prometheus there"
told impostor "$nobody" "a worker's labels in another namespace"

# By its name, which is what the chart's default goes by; another one's is left alone.
NS=observability made=''
if namespace_gone "$NS"; then
  made=$NS
  kubectl create namespace "$NS" >/dev/null
  kubectl label namespace "$NS" "trellis.dev/test=$PREFIX" >/dev/null
fi
ask "$PREFIX-prometheus" 'app.kubernetes.io/name: prometheus' "${all[@]}"
ask "$PREFIX-stranger" 'app: stranger' "${all[@]}"
told "$PREFIX-prometheus" "closed closed closed open open open" "Prometheus in the namespace observability"
told "$PREFIX-stranger" "$nobody" "a stranger in the namespace observability"
[ -z "$made" ] || remove_namespace "$made"

NS=$product
ask stranger 'app: stranger' "${all[@]}"
ask as-worker "$worker" "${services[@]}" "$api"
told stranger "$nobody" "a stranger of the same namespace"
told as-worker "open open closed" "a pod with a worker's labels, to PostgreSQL, Temporal and the API"
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test"; }
say "helm test under these policies: $(grep '^Phase:' "$WORK/test")"
remove_namespace "$PREFIX-outside"
