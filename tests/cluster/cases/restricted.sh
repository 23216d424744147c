# shellcheck shell=bash
# The same in a namespace that enforces Pod Security `restricted`, which several of the other cases go on using.

shared
# Otherwise all this would prove nothing.
if k run loose --image "$IMAGE" --restart Never >"$WORK/loose" 2>&1; then fail "the namespace takes a pod without a security context"; fi
grep -o 'violates PodSecurity "restricted:latest"' "$WORK/loose" || { cat "$WORK/loose"; fail "refused for another reason"; }
helm test trellis --namespace "$NS" --timeout 3m >"$WORK/test" 2>&1 || { cat "$WORK/test"; fail "helm test"; }
say "helm test: $(grep '^Phase:' "$WORK/test")"
contract_of_the_notes
k get events --field-selector reason=FailedCreate --output name | grep . && fail "a pod was refused" || true
