#!/usr/bin/env bash
# What `make demo` shows: a control plane and three nodes on this machine, an
# application from a git push to an answer through each node's proxy, and a
# second commit. Stays until Ctrl-C; with HOLD=0 it ends by itself.
set -euo pipefail

# shellcheck source=hack/testbed-session.sh
source "$(dirname "$0")/testbed-session.sh"

readonly nodes=(n1 n2 n3)
readonly host=python.example.com

heading "1. A Kubernetes control plane, three nodes with systemd, Kari's controller and agents"
say "   (the very first time, the control plane is built from source: 5 to 10 minutes)"
begin_testbed --nodes "${#nodes[@]}"
run kubectl get nodes

heading "2. A git push: examples/python becomes the repository hello-python"
app=$session_dir/hello-python
cp -r "$repository/examples/python" "$app"
{ read -r url; read -r commit; } < <(testbed git hello-python "$app" --message "Say hello")
say "   $url, commit ${commit:0:7}"

heading "3. kubectl apply: its manifest, with that URL"
sed "s#https://git.example.com/hello-python.git#$url#" "$app/deployment.yaml" >"$session_dir/deployment.yaml"
sed 's/^/   /' "$session_dir/deployment.yaml"
run kubectl apply -f "$session_dir/deployment.yaml"
follow_rollout hello-python "$commit"
run kubectl get kd,krel

heading "4. A request through the proxy of each node"
ask_each_node() {
    local node
    for node in "${nodes[@]}"; do
        printf '   %s: ' "$node"
        on_node "$node" curl --silent --show-error --fail --max-time 5 --header "Host: $host" http://127.0.0.1/
    done
}
ask_each_node

heading "5. A second commit, while each proxy is asked ten times a second"
sed -i 's/from Python on/from the second commit on/' "$app/hello/server.py"
{ read -r url; read -r commit; } < <(testbed git hello-python "$app" --message "Greet from the second commit")
say "   commit ${commit:0:7}"
for node in "${nodes[@]}"; do
    # shellcheck disable=SC2016  # $1 is the inner shell's
    on_node "$node" sh -c '
        while [ ! -e /run/demo-asked-enough ]; do
            curl --silent --max-time 5 --output /dev/null --write-out "%{http_code}\n" --header "Host: $1" http://127.0.0.1/ || true
            sleep 0.1
        done' sh "$host" >"$session_dir/answers-$node" &
done
# Kari looks at the repository each minute; this says: now.
run kubectl annotate kd/hello-python --overwrite "kari.dev/requestedAt=$(date --utc +%FT%TZ)"
follow_rollout hello-python "$commit"
for node in "${nodes[@]}"; do
    on_node "$node" touch /run/demo-asked-enough
done
wait
asked=$(cat "$session_dir"/answers-* | wc -l)
failed=$(cat "$session_dir"/answers-* | grep -cv '^200$' || true)
say "   $asked requests meanwhile, $failed failed"
ask_each_node
run kubectl get kd,krel
((failed == 0)) || { say "requests failed during the switch" >&2; exit 1; }

if [[ ${HOLD:-1} == 0 ]]; then
    exit
fi

heading "All of this runs until Ctrl-C. In another shell, as root:"
cat <<END
   export KUBECONFIG=$KUBECONFIG PATH=$testbed_dir/bin:${CARGO_TARGET_DIR:-$repository/target}/debug:\$PATH

   kubectl get kd,krel -w                              # leave it running while you try the rest
   kubectl describe kd hello-python                    # what it is, and why
   kubectl explain kd.spec.processes                   # what a manifest can say
   testbed exec n1 --dir $testbed_dir -- systemctl list-units 'kari*'    # what a node runs
   testbed exec n1 --dir $testbed_dir -- curl -s -H 'Host: $host' http://127.0.0.1/version

   # change the application: edit $app/hello/server.py, then
   testbed git hello-python $app --dir $testbed_dir
   kubectl annotate kd/hello-python --overwrite kari.dev/requestedAt=\$(date +%s)

   # (with a syntax error the build fails, says why, and the old release keeps serving)

   kubectl delete kd hello-python                      # and the nodes are as they were
END
sleep infinity &
wait
