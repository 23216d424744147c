# shellcheck shell=bash
# As tools do that render without a cluster and apply what they rendered: the lines of docs/kubernetes.md, twice, and nothing drifts.

namespace gitops
k create secret generic trellis-postgresql-own --from-literal=postgres-password=a --from-literal=migrate-password=b \
  --from-literal=app-password=c --from-literal=temporal-password=d >/dev/null
sync() { # sync [HELM_ARGUMENT…]: render, and apply as the tool's own
  helm template trellis "$CHART" --namespace "$NS" --no-hooks --values "$VALUES" --set "image.repository=${IMAGE%:*},image.tag=${IMAGE##*:}" \
    --set global.trellis.postgresqlSecret=trellis-postgresql-own \
    --set jobs.ttlSecondsAfterFinished=null,temporal.jobs.ttlSecondsAfterFinished=null \
    --set api.replicas=1,workerDefaults.replicas=1 "$@" >"$WORK/rendered.yaml"
  kubectl apply --server-side --field-manager=gitops --namespace "$NS" --filename "$WORK/rendered.yaml" >"$WORK/applied" 2>&1 ||
    { cat "$WORK/applied"; fail "kubectl apply --server-side"; }
}
versions() { k get --filename "$WORK/rendered.yaml" --output 'jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.generation}{"\n"}{end}'; }
sync
for deployment in api worker-default worker-shipping; do
  k rollout status "deployment/trellis-$deployment" --timeout 480s >"$WORK/rollout" 2>&1 || { cat "$WORK/rollout"; fail "$deployment"; }
done
! grep -q '^kind: Secret$' "$WORK/rendered.yaml" || fail "a Secret is rendered, so it would be another one each time"
before=$(versions)
sync
equal "$(versions)" "$before" "what a second sync changes"
kubectl diff --server-side --field-manager=gitops --namespace "$NS" --filename "$WORK/rendered.yaml" >"$WORK/diff" 2>&1 || { cat "$WORK/diff"; fail "kubectl diff"; }
# Other settings: only what they change is another, and its Jobs are made anew beside the old ones.
sync --set settings.log_level=debug
k rollout status deployment/trellis-api --timeout 240s >/dev/null || fail "the API with other settings"
forward
demo 1 --patience 120 || fail "an order"
stop_forwards
remove_namespace "$NS"
