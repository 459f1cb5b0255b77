"""Trains in Kubernetes as a JobSet: its manifest, printed with --dry-run, otherwise applied.

    python -m launch.kubernetes --name dalle --image IMAGE --claim CLAIM \\
        --tpu tpu-v5p-slice --topology 8x8x8 --slices 2 -- \\
        --config experiments/dalle.py:12b,path=/data/tokens --workdir /data/runs/dalle

    python -m launch.kubernetes --name dalle --image IMAGE --claim CLAIM --nodes 4 -- ...

One pod, and in it one rank, for each host. TPUs: GKE tells every pod its place in the slices, which
jax finds. GPUs: the rank is told the name of pod 0 and the index of its own pod. IMAGE has this
repository installed and as its working directory; CLAIM is a persistent volume claim that all pods
may write at once, mounted at --mount, for the data and the workdir.

In a pod launch.supervise restarts a rank that dies. A pod that is lost, or whose supervisor gives
up, makes the JobSet start all pods again; pods that were told to stop (a node is drained, a spot
machine is taken away) save and end with 143, and such restarts are not counted. Needs JobSet 0.6 or
newer in the cluster.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launch import arguments, supervise
from launch.environment import environment

PORT = 8476
JOB = 'ranks'
POOL = 'cloud.google.com/gke-nodepool'


def manifest(training: Sequence[str], workdir: str, name: str, image: str, claim: str, mount: str,
             resource: str, per_host: int, hosts: int, slices: int = 1,
             selector: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None,
             restarts: int = 3, max_restarts: int = 10, host_network: bool = False,
             privileged: bool = False) -> dict:
    """The JobSet.

    Args:
      resource: 'google.com/tpu' or 'nvidia.com/gpu'; of which a host has `per_host`.
      hosts: of each slice.
      selector: labels that a node must have.
      env: variables of the ranks beside those of launch.environment.
      restarts: of a rank in its pod, in a row without a new checkpoint.
      max_restarts: of all pods together.
    """
    tpu = resource == 'google.com/tpu'
    distributed = 'auto' if tpu else f'{name}-{JOB}-0-0.{name}:{PORT},{hosts},'
    words = arguments.supervised(arguments.train(training, distributed), workdir, restarts)
    # Kubernetes replaces $(NAME) in a command, and $$ is a $; only the index is meant so.
    words = [word.replace('$', '$$') for word in words]
    if not tpu:
        words[-1] += '$(JOB_COMPLETION_INDEX)'
    variables = environment('tpu' if tpu else 'cuda', slices) | dict(env or {})
    volumes = {'shared': ({'persistentVolumeClaim': {'claimName': claim}}, mount)}
    if not tpu:  # NCCL's; a container has 64 MB otherwise
        volumes['memory'] = ({'emptyDir': {'medium': 'Memory'}}, '/dev/shm')
    container = {
        'name': 'rank',
        'image': image,
        'command': words,
        'env': [{'name': key, 'value': value} for key, value in variables.items()],
        'resources': {'limits': {resource: per_host}},
        'volumeMounts': [{'name': key, 'mountPath': path} for key, (_, path) in volumes.items()],
    }
    if privileged:
        container['securityContext'] = {'privileged': True}
    pod = {
        'restartPolicy': 'Never',  # the JobSet restarts all pods together
        'terminationGracePeriodSeconds': int(supervise.SAVING) + 30,
        'nodeSelector': dict(selector or {}),
        'tolerations': [{'key': resource, 'operator': 'Exists'}],
        'containers': [container],
        'volumes': [{'name': key, **source} for key, (source, _) in volumes.items()],
    }
    if host_network:
        pod |= {'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet'}
    stopped = {'containerName': 'rank', 'operator': 'In', 'values': [supervise.STOPPED]}
    job = {
        'completionMode': 'Indexed',
        'parallelism': hosts,
        'completions': hosts,
        'backoffLimit': 0,
        'podFailurePolicy': {'rules': [
            {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget',
                                                       'status': 'True'}]},
            {'action': 'FailJob', 'onExitCodes': stopped}]},
        'template': {'spec': pod},
    }
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        # A slice is a node pool, and no other slice's pods may land in it.
        'metadata': {'name': name, 'annotations': {
            'alpha.jobset.sigs.k8s.io/exclusive-topology': POOL} if tpu else {}},
        'spec': {
            'network': {'enableDNSHostnames': True, 'subdomain': name,
                        'publishNotReadyAddresses': True},
            'failurePolicy': {
                'maxRestarts': max_restarts,
                'restartStrategy': 'BlockingRecreate',  # never two sessions in one workdir
                'rules': [{'name': 'stopped', 'action': 'RestartJobSetAndIgnoreMaxRestarts',
                           'onJobFailureReasons': ['PodFailurePolicy']}]},
            'replicatedJobs': [{'name': JOB, 'replicas': slices, 'template': {'spec': job}}],
        },
    }


def _topology(text):
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a topology such as 4x4 or 4x4x8')
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m launch.kubernetes',
        usage='%(prog)s --name NAME --image IMAGE --claim CLAIM (--tpu TYPE --topology AxB | '
              '--nodes N) [options] -- ARGUMENTS OF dalle_jax.train',
        description='Trains in Kubernetes as a JobSet.')
    count = arguments.count
    parser.add_argument('--name', required=True, help='of the JobSet')
    parser.add_argument('--image', required=True)
    parser.add_argument('--claim', required=True, help='persistent volume claim (ReadWriteMany)')
    parser.add_argument('--mount', default='/data', help='where it is mounted (default /data)')
    parser.add_argument('--tpu', metavar='TYPE', help='such as tpu-v5p-slice or tpu-v6e-slice')
    parser.add_argument('--topology', type=_topology, metavar='AxB', help='of a slice')
    parser.add_argument('--chips-per-host', type=count(1), default=4, metavar='N',
                        help='default 4')
    parser.add_argument('--slices', type=count(1), default=1, metavar='N', help='default 1')
    parser.add_argument('--nodes', type=count(1), metavar='N', help='of GPUs')
    parser.add_argument('--gpus-per-node', type=count(1), default=8, metavar='N', help='default 8')
    parser.add_argument('--node-selector', type=arguments.pair, action='append', default=[],
                        metavar='KEY=VALUE', help='may be given several times')
    parser.add_argument('--env', type=arguments.variable, action='append', default=[],
                        metavar='NAME=VALUE', help='may be given several times')
    parser.add_argument('--restarts', type=count(0), default=3, metavar='N',
                        help='of a rank in its pod, in a row without a new checkpoint (default 3)')
    parser.add_argument('--max-restarts', type=count(0), default=10, metavar='N',
                        help='of all pods (default 10)')
    parser.add_argument('--host-network', action='store_true',
                        help="the node's network without the cluster's overlay: faster")
    parser.add_argument('--privileged', action='store_true', help='where the cluster demands it')
    parser.add_argument('--dry-run', action='store_true',
                        help='print the manifest, apply nothing')
    options, training = arguments.split(parser, argv)
    workdir = arguments.check_training(parser, training, shared=True)
    if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', options.name):
        parser.error(f'--name {options.name!r}; at most 40 lower-case letters, digits and -')
    if not f'{workdir}/'.startswith(options.mount.rstrip('/') + '/'):
        parser.error(f'--workdir {workdir} is not below --mount {options.mount}; it would be lost '
                     'with the pod')
    if bool(options.tpu) == bool(options.nodes) or bool(options.tpu) != bool(options.topology):
        parser.error('give --tpu and --topology, or --nodes of GPUs')
    selector = dict(options.node_selector)
    if options.tpu:
        chips = math.prod(map(int, options.topology.split('x')))
        hosts, rest = divmod(chips, options.chips_per_host)
        if rest:
            parser.error(f'--topology {options.topology} has {chips} chips, which '
                         f'--chips-per-host {options.chips_per_host} does not divide')
        hardware = dict(resource='google.com/tpu', per_host=options.chips_per_host, hosts=hosts,
                        slices=options.slices)
        selector |= {'cloud.google.com/gke-tpu-accelerator': options.tpu,
                     'cloud.google.com/gke-tpu-topology': options.topology}
    else:
        hardware = dict(resource='nvidia.com/gpu', per_host=options.gpus_per_node,
                        hosts=options.nodes)
    text = json.dumps(manifest(
        training, workdir, options.name, options.image, options.claim, options.mount,
        selector=selector, env=dict(options.env), restarts=options.restarts,
        max_restarts=options.max_restarts, host_network=options.host_network,
        privileged=options.privileged, **hardware), indent=2)
    if options.dry_run:
        print(text)
        return 0
    arguments.require(parser, 'kubectl', 'install it and choose the cluster')
    return subprocess.run(['kubectl', 'apply', '-f', '-'], input=text, text=True).returncode


if __name__ == '__main__':
    sys.exit(main())
