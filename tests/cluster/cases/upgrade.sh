# shellcheck shell=bash
# Another image, and the one before again, under a hundred orders that are open: parked in review, or with a provider that
# is down for half a minute.

shared
forward
charge_some() {
  orders start "up-charge-$RUN-$1" 10 --payment pay-down
  orders approve "up-charge-$RUN-$1" 10
  until_true 25 "none of them gets to charging" some_are_charging "up-charge-$RUN-$1"
}
runs() { # the images that the pods of the product run
  k get pods --selector app.kubernetes.io/name=trellis --field-selector status.phase=Running --output json |
    json '" ".join(sorted({c["image"] for p in d["items"] if "deletionTimestamp" not in p["metadata"] for c in p["spec"]["containers"]}))'
}

orders start up-parked-$RUN 90
orders wait up-parked-$RUN 90 --step awaiting_review
charge_some 1
say "open: $(in_state awaiting_review up-parked-$RUN) parked in review, $(in_state charging up-charge-$RUN) charging"
demo 30 --mix --concurrency 3 --patience 240 >"$WORK/demo" & # others come and go meanwhile
demo=$!
upgrade "$NEXT"
equal "$(runs)" "$NEXT" "images after the upgrade"
wait "$demo" || { cat "$WORK/demo"; fail "orders that came during the upgrade"; }
say "meanwhile: $(tail -n 1 "$WORK/demo")"
equal "$(in_state awaiting_review up-parked-$RUN)" 90 "orders still parked"
orders approve up-parked-$RUN 45

charge_some 2
demo 30 --mix --concurrency 3 --patience 240 >"$WORK/demo" &
demo=$!
began=$(seconds)
helm rollback trellis --namespace "$NS" --wait --timeout 8m >"$WORK/rollback" 2>&1 || { cat "$WORK/rollback"; fail "helm rollback"; }
say "helm rollback --wait: $(since "$began") s"
equal "$(runs)" "$IMAGE" "images after the rollback"
wait "$demo" || { cat "$WORK/demo"; fail "orders that came during the rollback"; }
say "meanwhile: $(tail -n 1 "$WORK/demo")"
orders approve up-parked-$RUN 90 --first 46

orders wait up-parked-$RUN 90
orders wait up-charge-$RUN-1 10
orders wait up-charge-$RUN-2 10
books_clean
