# shellcheck shell=bash
# New passwords in the Secret, without a restart of PostgreSQL or of the product: it takes them by itself and refuses the old ones, and
# whoever connects anew reads them. In a pod with ids of the platform: any user, and group 0, as far as the images at hand can (that of PostgreSQL here cannot).

namespace rotation
passwords() { # passwords WHICH: a Secret with them
  k create secret generic own --from-literal="postgres-password=super-$1" --from-literal="migrate-password=migrate-$1" \
    --from-literal="app-password=app-$1" --from-literal="temporal-password=temporal-$1" --dry-run=client --output yaml | k apply --filename - >/dev/null
}
passwords one
any='{"runAsNonRoot": true, "runAsUser": 1000680000, "runAsGroup": 0, "seccompProfile": {"type": "RuntimeDefault"}}'
install --set global.trellis.postgresqlSecret=own --set api.replicas=1,workerDefaults.replicas=1 \
  --set-json "podDefaults.podSecurityContext=$any" --set-json "temporal.podSecurityContext=$any"
equal "$(k exec deploy/trellis-api -- id --user)" 1000680000 "the user of the API"
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test"; }
restarts() { k get pod trellis-postgresql-0 --output 'jsonpath={.metadata.uid} {.status.containerStatuses[0].restartCount}'; }
before=$(restarts)
passwords two
opens() { # opens PASSWORD: by TCP, as everybody else
  k exec trellis-postgresql-0 -- env PGPASSWORD="$1" psql --host 127.0.0.1 --username trellis_app --dbname trellis --command 'SELECT 1' >/dev/null 2>&1
}
until_true 180 "PostgreSQL does not take the new password" opens app-two
! opens app-one || fail "PostgreSQL still takes the old password"
equal "$(restarts)" "$before" "the pod of PostgreSQL"
# The product: no connection from before is left, and the same pods have new ones.
pods() { k get pods --selector app.kubernetes.io/name=trellis,trellis.dev/metrics=true --output json | json 'sorted((p["metadata"]["name"], sum(c["restartCount"] for c in p["status"]["containerStatuses"])) for p in d["items"])'; }
mounted() { k exec "deploy/trellis-$1" -- grep -qx app-two /etc/trellis/postgresql/password 2>/dev/null; }
ready() { [ "$(k get pods --selector app.kubernetes.io/name=trellis,trellis.dev/metrics=true --output json | json 'all(c["ready"] for p in d["items"] for c in p["status"]["containerStatuses"])')" = True ]; }
product=$(pods)
for deployment in api worker-default worker-shipping; do until_true 180 "$deployment does not have the new password" mounted "$deployment"; done
say "connections ended: $(sql "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'trellis_app'")"
until_true 120 "the product does not get ready again" ready
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test with the new password"; }
equal "$(pods)" "$product" "pods of the product, and how often they were started"
say "the new passwords hold, and nothing was restarted: $product"
# Temporal is given its own at the start.
k rollout restart deployment/trellis-temporal >/dev/null
k rollout status deployment/trellis-temporal --timeout 240s >"$WORK/rollout" || { cat "$WORK/rollout"; fail "Temporal with the new password"; }

# A larger volume, by the lines of the chart's README: the claim belongs to nobody meanwhile, and the pod goes on.
before=$(restarts)
k delete statefulset trellis-postgresql --cascade=orphan >/dev/null
upgrade "$IMAGE" --set postgresql.persistence.size=9Gi
equal "$(restarts)" "$before" "the pod of PostgreSQL, which has another StatefulSet"
equal "$(k get statefulset trellis-postgresql --output 'jsonpath={.spec.volumeClaimTemplates[0].spec.resources.requests.storage}')" 9Gi "the volume asked for"
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test with the new StatefulSet"; }
equal "$(sql "SELECT count(*) FROM orders")" 3 "orders in the volume"
remove_namespace "$NS"
