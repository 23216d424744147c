# shellcheck shell=bash
# From the release that people have to this one and back again, with orders open at every step an order can be open at: the
# workers of both run side by side meanwhile, what one began the other ends, and the books are clean in the end.

previous_release || exit 0
namespace upgrade
# With the values of that release, which knows nothing of later ones.
VALUES=$WORK/previous/tests/cluster/values.yaml CHART=$WORK/previous/charts/trellis IMAGE=$PREVIOUS install
forward

runs() { # the images that the pods of the product run
  k get pods --selector app.kubernetes.io/name=trellis --field-selector status.phase=Running --output json |
    json '" ".join(sorted({c["image"] for p in d["items"] if "deletionTimestamp" not in p["metadata"] for c in p["spec"]["containers"]}))'
}
no_workers() { [ -z "$(k get pods --selector "trellis.dev/worker=$1" --output name)" ]; }
without() { # without WORKER: no pod of it
  k scale "deployment/trellis-worker-$1" --replicas 0 >/dev/null
  until_true 90 "the $1 workers do not end" no_workers "$1"
}
hold() { # hold NAME: ten orders at each step, where none but a worker that is not there takes them on
  orders start "review-$1" 20
  orders wait "review-$1" 20 --step awaiting_review
  orders start "prepared-$1" 10 --zip 00005 # where the carrier takes nothing
  orders approve "prepared-$1" 10
  orders wait "prepared-$1" 10 --step prepared
  without shipping
  orders start "charged-$1" 10
  orders approve "charged-$1" 10
  orders wait "charged-$1" 10 --step charged
  orders start "charging-$1" 10 --payment pay-down # for half a minute
  orders approve "charging-$1" 10
  until_true 25 "none of them gets to charging" some_are_charging "charging-$1"
  without default
  orders start "received-$1" 10
  orders wait "received-$1" 10 --step received
  some_are_charging "charging-$1" || fail "no order is charging any more"
  say "open: 10 received, $(in_state awaiting_review "review-$1") in review, $(in_state charging "charging-$1") charging," \
    "$(in_state charged "charged-$1") charged, $(in_state prepared "prepared-$1") prepared"
  # Both again, so that those of this release take up some of it while those of the other come.
  k scale deployment/trellis-worker-default deployment/trellis-worker-shipping --replicas 2 >/dev/null
}
under() { # under IMAGE WHAT COMMAND…: while others come and go
  local demo image=$1 what=$2
  shift 2
  demo 30 --mix --concurrency 3 --patience 240 >"$WORK/demo" &
  demo=$!
  "$@"
  equal "$(runs)" "$image" "images after the $what"
  wait "$demo" || { cat "$WORK/demo"; fail "orders that came during the $what"; }
  say "meanwhile: $(tail -n 1 "$WORK/demo")"
}
let_go() { # let_go NAME: all that is held, but half of what is in review
  orders wait "received-$1" 10 --step awaiting_review
  orders approve "received-$1" 10
  equal "$(in_state awaiting_review "review-$1")" 20 "orders still in review"
  orders approve "review-$1" 10
  orders cancel "prepared-$1" 10
  orders wait "prepared-$1" 10 --step cancelled
  local step
  for step in review charging charged received; do orders wait "$step-$1" 10; done
}

hold "$RUN-1"
under "$IMAGE" upgrade upgrade "$IMAGE" --set sandbox.enabled=true
let_go "$RUN-1"
books_clean

hold "$RUN-2"
under "$PREVIOUS" rollback roll_back
let_go "$RUN-2"
for number in 1 2; do
  orders approve "review-$RUN-$number" 20 --first 11
  orders wait "review-$RUN-$number" 20
done
refunds="SELECT count(*) FROM sandbox.refunds JOIN sandbox.charges ON charges.id = charge_id WHERE payment LIKE 'pay-prepared-$RUN-%'"
equal "$(sql "$refunds")" 20 "refunds of what was cancelled, in the provider's books"
books_clean
stop_forwards
remove_namespace "$NS"
