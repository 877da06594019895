#!/bin/sh
# Walks down a narrow valley, f = (x² + 30 y²) / 2, with nothing but sh, awk and curl: the gradient is computed here,
# the optimizer is in the service.
#
#     sh examples/ravine.sh [sgd|momentum|rmsprop|adam] [URL]
#
# Left out: adam, http://127.0.0.1:8000. A service that asks for a key is sent the one in RAVINE_KEY. Prints every tenth
# point and the last one. Exit status: 0 at the minimum, 1 if the service is not there, refuses, or leads nowhere, 2 if it
# was called wrongly.

set -eu
export LC_ALL=C # a decimal comma in awk would not be JSON

kind=${1:-adam}
url=${2:-http://127.0.0.1:8000}
url=${url%/}
start='{"x":-4,"y":1.5}'
tolerance=0.001 # of the gradient's length
limit=1000      # steps
session=

case $kind in
sgd) optimizer='{"kind":"sgd","lr":0.06}' ;;
momentum) optimizer='{"kind":"momentum","lr":0.02,"momentum":0.8}' ;;
# With a constant rate RMSProp would go on jumping to and fro across the minimum, so its rate decays.
rmsprop) optimizer='{"kind":"rmsprop","lr":{"kind":"exponential","init":0.2,"rate":0.97},"alpha":0.9}' ;;
adam) optimizer='{"kind":"adam","lr":0.3,"beta1":0.8,"beta2":0.99}' ;;
*)
    echo "usage: ravine.sh [sgd|momentum|rmsprop|adam] [URL]" >&2
    exit 2
    ;;
esac

fail() {
    echo "ravine.sh: $1" >&2
    exit 1
}

# The key, where it is in no list of processes.
authorization() {
    [ -z "${RAVINE_KEY:-}" ] || printf 'header = "Authorization: Bearer %s"\n' "$RAVINE_KEY"
}

# call METHOD PATH [JSON] prints the body of the reply.
call() {
    reply=$(authorization | curl --config - --silent --show-error --max-time 30 --request "$1" \
        --header 'Content-Type: application/json' ${3:+--data "$3"} --write-out '\n%{http_code}' "$url$2") ||
        fail "no service answers at $url; \`make serve\` starts one on http://127.0.0.1:8000"
    status=$(printf '%s\n' "$reply" | tail -n 1)
    body=$(printf '%s\n' "$reply" | sed '$d')
    case $status in
    2??) printf '%s\n' "$body" ;;
    *) fail "$1 $url$2: $status $body" ;;
    esac
}

# look JSON finds the numbers "x" and "y" in it and prints: x, y, f, df/dx, df/dy, length of the gradient.
look() {
    printf '%s\n' "$1" | awk '
        function member(name) {
            if (!match($0, "\"" name "\":[-+.0-9eE]+")) exit 1
            return substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) + 0
        }
        {
            x = member("x"); y = member("y")
            dx = x; dy = 30 * y
            f = (x * x + 30 * y * y) / 2
            printf "%.17g %.17g %.17g %.17g %.17g %.17g\n", x, y, f, dx, dy, sqrt(dx * dx + dy * dy)
        }'
}

delete_session() {
    [ -z "$session" ] || call DELETE "/v1/sessions/$session" >/dev/null
}

for tool in curl awk sed tail; do
    command -v "$tool" >/dev/null || fail "$tool is needed"
done

# Whatever ends this program, its session does not stay behind.
trap delete_session EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

created=$(call POST /v1/sessions \
    "{\"name\":\"ravine.sh\",\"dtype\":\"float64\",\"optimizer\":$optimizer,\"params\":$start}")
session=$(printf '%s\n' "$created" | sed -n 's/.*"id":"\(ses_[a-z0-9]*\)".*/\1/p')
[ -n "$session" ] || fail "$url is not Ravine: $created"

echo "$kind, session $session"
echo "step            x            y            f"
step=0
point=$start
while :; do
    numbers=$(look "$point") || fail "no numbers x and y in $point"
    # shellcheck disable=SC2086 # six numbers, to be split
    set -- $numbers
    arrived=$(awk "BEGIN { print ($6 < $tolerance) }")
    if [ "$arrived" = 1 ] || [ $((step % 10)) = 0 ]; then
        printf '%4d %12.6f %12.6f %12.4e\n' "$step" "$1" "$2" "$3"
    fi
    [ "$arrived" = 0 ] || break
    [ "$step" -lt "$limit" ] || fail "no minimum after $limit steps"
    point=$(call POST "/v1/sessions/$session/steps" "{\"gradients\":{\"x\":$4,\"y\":$5},\"loss\":$3}")
    step=$((step + 1))
done
echo "at the minimum after $step steps"
