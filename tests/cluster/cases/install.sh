# shellcheck shell=bash
# From an empty namespace to a shipped order, by the lines that helm prints; and back to nothing but the named volume,
# which another installation takes up again.

namespace install
install
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test"; }
say "helm test: $(grep '^Phase:' "$WORK/test")"
contract_of_the_notes

left() { # what is in the namespace that Kubernetes did not put there itself
  local kind
  for kind in $(kubectl api-resources --namespaced --verbs=list,delete --output name | grep -v -E '^(events|endpointslices|endpoints|pods.metrics)'); do
    k get "$kind" --output name --ignore-not-found 2>/dev/null
  done | grep -v -E '^(serviceaccount/default|configmap/kube-root-ca.crt)$' | sort
}
only_volumes_are_left() { [ "$(left)" = "$named" ]; }
named=$(helm get notes trellis --namespace "$NS" | grep -o '\<data-[a-z0-9-]*-[0-9]\>' | sort -u | sed 's,^,persistentvolumeclaim/,')
began=$(seconds)
helm uninstall trellis --namespace "$NS" --wait --timeout 3m >/dev/null || fail "helm uninstall"
because=left until_true 60 "what is left after helm uninstall is not: $named" only_volumes_are_left
say "helm uninstall --wait: $(since "$began") s; left: $named"
[ -n "$named" ] || fail "the notes name no volume"
equal "$(kubectl get clusterroles,clusterrolebindings,persistentvolumes --selector app.kubernetes.io/instance=trellis --output name)" '' \
  "left outside of the namespace"

install
forward
equal "$(step "$(sed -n 's,^ *curl .*/orders/\(.*\)/status.*,\1,p' "$WORK/notes")")" shipped "the order of the installation before"
stop_forwards
remove_namespace "$NS"
