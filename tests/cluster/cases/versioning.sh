# shellcheck shell=bash
# Worker versioning: the image's build id is promoted when its workers poll; orders parked across an upgrade and a rollback
# all close, moved over to the workers that are current.

next_image
namespace versioning
install --set workerVersioning.enabled=true
forward
current() { # the build id that gets the orders
  k exec deploy/trellis-worker-default -- trellis deployment show --json 2>/dev/null |
    json '[each["build_id"] for each in d if each["state"] == "current"]'
}
promoted() { [ "$(current)" = "['${1##*:}']" ]; }
because=current until_true 120 "$IMAGE is not promoted" promoted "$IMAGE"
say "current: $(current)"

orders start ver-parked 30
orders wait ver-parked 30 --step awaiting_review
upgrade "$NEXT"
because=current until_true 120 "$NEXT is not promoted" promoted "$NEXT"
say "current: $(current)"
orders approve ver-parked 10
orders wait ver-parked 10
roll_back
because=current until_true 120 "$IMAGE is not promoted again" promoted "$IMAGE"
say "current: $(current)"
orders approve ver-parked 30 --first 11
orders wait ver-parked 30
books_clean
stop_forwards
remove_namespace "$NS"
