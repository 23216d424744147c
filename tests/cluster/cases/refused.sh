# shellcheck shell=bash
# An upgrade that the API server refuses, after it has taken half of it: what was there before is there again, by `--atomic`
# and by the first `helm rollback`, with the settings that it had, and no Job of it is left.

shared
live() { # what the cluster has, where the refused upgrade has something else
  k get configmap trellis --output jsonpath='{.data.TRELLIS_LOG_LEVEL}{" "}'
  k get deployments --selector app.kubernetes.io/name=trellis --output jsonpath='{range .items[*]}{.metadata.name}: {.spec.replicas}{" "}{end}'
  # Those that have ended go by themselves, some of them soon.
  k get jobs --output name | grep -v -- -promote- | sort | tr '\n' ' '
}
deployed() { helm status trellis --namespace "$NS" --output json | json 'd["info"]["status"] + ": " + d["info"]["description"]'; }
refused() { # refused [HELM_ARGUMENT…]: other settings, so other Jobs, and a strategy that Kubernetes does not take
  if helm upgrade trellis "$CHART" --namespace "$NS" --reset-then-reuse-values --set settings.log_level=debug,workerDefaults.replicas=1 \
    --set-json 'api.strategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}' --timeout 5m "$@" >"$WORK/refused" 2>&1; then
    fail "Kubernetes takes a strategy that can replace no pod, so this proved nothing"
  fi
  grep -q 'maxUnavailable' "$WORK/refused" || { cat "$WORK/refused"; fail "refused for another reason"; }
}

before=$(live)
say "before: $before"
[[ $before = *migrate* ]] || upgrade "$IMAGE" # after a long while, which ended the Jobs; they are what this is about
before=$(live)
refused --atomic
say "$(deployed)"
[[ $(deployed) = deployed:* ]] || { cat "$WORK/refused"; fail "helm upgrade --atomic did not go back"; }
equal "$(live)" "$before" "settings, replicas and Jobs after --atomic"

refused
[[ $(deployed) = failed:* ]] || fail "the refused upgrade is not failed: $(deployed)"
[ "$(live)" != "$before" ] || fail "nothing of the refused upgrade is there, so this proved nothing"
roll_back
[[ $(deployed) = deployed:* ]] || fail "helm rollback: $(deployed)"
equal "$(live)" "$before" "settings, replicas and Jobs after helm rollback"
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test"; }
say "helm test: $(grep '^Phase:' "$WORK/test")"
