# Sourced by a pod's shell before KubeRay's own `ray start`, as the container's `command` in cluster/manifests/kuberay says:
#   . docker/pod.sh node CONFIG [--set a.b=c ...]     the run directory and the environment of this project
#   . docker/pod.sh head CONFIG [--set a.b=c ...]     the same, and a process that deploys CONFIG once Ray answers
# With a mistake the shell ends, and so does the pod, with one line that says why.
pod_role=$1 pod_config=$2
shift 2
# KubeRay and clients reach a pod by its address; the volume is mounted at /data.
set -- "$pod_config" --run-dir /data/run --set node.host=0.0.0.0 "$@"
pod_environment=$(python -m cluster environment "$@") || exit 2
eval "$pod_environment"
case $pod_role in
  node) ;;
  head)
    (
      until ray health-check --address 127.0.0.1:6379 >/dev/null 2>&1; do sleep 2; done
      exec python -m cluster deploy "$@"
    ) &
    ;;
  *)
    echo "error: docker/pod.sh: write head or node, found $pod_role" >&2
    exit 2
    ;;
esac
