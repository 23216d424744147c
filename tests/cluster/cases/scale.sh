# shellcheck shell=bash
# A backlog of 500 orders: the autoscaler, fed by the real metrics server, adds workers and takes them away again, and no
# attempt fails for it.

shared
forward
# Less CPU and less patience than a production would have, so that there is something to see within minutes.
upgrade "$IMAGE" --set workerDefaults.autoscaling.enabled=true,workerDefaults.autoscaling.minReplicas=1 \
  --set workerDefaults.autoscaling.maxReplicas=4,workerDefaults.resources.requests.cpu=100m,workerDefaults.resources.limits.cpu=300m --set-json \
  'workerDefaults.autoscaling.behavior={"scaleDown": {"stabilizationWindowSeconds": 15, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 15}]}}'
workers() { k get deploy trellis-worker-default --output jsonpath='{.status.readyReplicas}'; }
measured() { k get hpa trellis-worker-default --output jsonpath='{.status.currentMetrics[0].resource.current.averageUtilization}' | grep -q .; }
is_alone() { [ "$(workers)" = 1 ]; }
because="k describe hpa trellis-worker-default" until_true 120 "the autoscaler gets no CPU figures" measured
until_true 120 "the idle workers do not shrink to one" is_alone

since_now=$(sql "SELECT now()") # what failed in another case is no matter of this one
orders start "scale-$RUN" 500
began=$(seconds)
orders approve "scale-$RUN" 500
most=1
orders wait "scale-$RUN" 500 --seconds 400 &
waiting=$!
while kill -0 "$waiting" 2>/dev/null; do
  now=$(workers)
  if ((${now:-0} > most)); then
    most=$now
    say "$most workers ready $(since "$began") s after the first approval"
  fi
  sleep 1
done
wait "$waiting" || fail "the backlog is not worked off"
((most > 1)) || fail "still one worker: $(k describe hpa trellis-worker-default | tail -n 12)"

# Orders trickle in while workers are taken away, so that those have something in hand.
demo 60 --concurrency 2 --patience 240 >"$WORK/demo" &
demo=$!
because="k describe hpa trellis-worker-default" until_true 240 "the workers do not shrink again" is_alone
say "one worker again $(since "$began") s after the first approval"
wait "$demo" || { cat "$WORK/demo"; fail "orders that came while workers were taken away"; }
k get events --field-selector reason=SuccessfulRescale --output custom-columns=M:.message --no-headers | sed 's/^/cluster: /'

equal "$(sql "SELECT count(*) FROM events WHERE type = 'attempt_failed' AND (order_id LIKE 'scale-$RUN-%' OR order_id LIKE 'demo-%')
  AND ts > '$since_now' AND payload_json::text !~ 'PaymentDeclined|flaky'")" 0 "attempts that failed"
books_clean
roll_back
