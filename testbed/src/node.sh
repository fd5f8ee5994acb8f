#!/bin/bash
# Boots systemd as PID 1 of namespaces of its own, on an overlay of this
# machine's root. Called by node.rs as `launch`, which calls itself as `enter`
# and then `boot` inside the namespaces. From the environment:
#   NODE_NAME         host name
#   NODE_DIR          the node's folder: upper/ work/ root/ kari/ credentials/
#   NODE_GROUP        name of its cgroup in each hierarchy
#   NODE_BINDS        file with a read-only bind a line: SOURCE TAB TARGET
#   NODE_LIBRARIES    file with a folder of shared libraries a line, as the node sees it
#   LAB_NETNS         the lab's network namespace; empty: the machine's network is shared
#   NODE_ADDRESS      address and prefix length in the lab
#   NODE_GATEWAY      of a node with a kubelet: the lab's address, by which it reaches the others' Pods; else empty
#   KARI_TESTBED      id of the testbed, kept in the environment of PID 1
set -euo pipefail

# Everything that would touch the machine's hardware or kernel, that has no
# meaning here, or that takes time for nothing.
readonly MASKED="
  systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket systemd-udevd-kernel.socket
  systemd-modules-load.service systemd-sysctl.service systemd-random-seed.service systemd-remount-fs.service
  systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-binfmt.service systemd-firstboot.service
  systemd-sysusers.service systemd-hwdb-update.service systemd-journal-catalog-update.service systemd-update-done.service
  systemd-timesyncd.service systemd-pstore.service systemd-boot-random-seed.service systemd-repart.service
  systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-machine-id-commit.service systemd-logind.service
  systemd-tmpfiles-setup-dev.service systemd-tmpfiles-setup-dev-early.service kmod-static-nodes.service
  systemd-ask-password-console.path systemd-ask-password-wall.path systemd-user-sessions.service
  systemd-networkd.service systemd-resolved.service systemd-oomd.service systemd-initctl.socket
  sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount
  dev-hugepages.mount dev-mqueue.mount proc-sys-fs-binfmt_misc.automount getty.target
  cryptsetup.target integritysetup.target veritysetup.target
  ldconfig.service hwclock.service procps.service apparmor.service
  keyboard-setup.service console-setup.service x11-common.service ssh.service ssh.socket"

# One cgroup in every hierarchy, below the caller's own in version 1 (so that
# its accounting stays), below the root in version 2, where only the root may
# hold processes beside cgroups with controllers. The list is what `down` removes.
make_cgroups() {
  local controllers path hierarchy group controller available
  : >"$NODE_DIR/cgroups"
  if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
    read -ra available </sys/fs/cgroup/cgroup.controllers
    for controller in "${available[@]}"; do
      echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || echo "cgroup controller $controller is not delegated: limits that need it are not enforced"
    done
    echo "/sys/fs/cgroup/$NODE_GROUP" >"$NODE_DIR/cgroups"
    mkdir -p "/sys/fs/cgroup/$NODE_GROUP"
  else
    while IFS=: read -r _ controllers path; do
      case $controllers in
        name=*) hierarchy=${controllers#name=} ;;
        "") hierarchy=unified ;;
        *) hierarchy=$controllers ;;
      esac
      [ -d "/sys/fs/cgroup/$hierarchy" ] || continue
      group=/sys/fs/cgroup/$hierarchy${path%/}/$NODE_GROUP
      echo "$group" >>"$NODE_DIR/cgroups"
      mkdir -p "$group"
      case $hierarchy in
        devices) echo 'b *:* rw' >"$group/devices.deny" ;; # no disk of the machine
        cpuset)
          cat "${group%/*}/cpuset.cpus" >"$group/cpuset.cpus"
          cat "${group%/*}/cpuset.mems" >"$group/cpuset.mems"
          ;;
      esac
    done </proc/self/cgroup
  fi
}

connect_to_lab() {
  nsenter --net="$LAB_NETNS" ip link delete "v-$NODE_NAME" 2>/dev/null || true # of the boot before
  # netns 1 is this process: numbers are read in the caller's PID namespace.
  nsenter --net="$LAB_NETNS" ip -batch - <<BATCH
link add v-$NODE_NAME type veth peer name eth0 netns 1
link set v-$NODE_NAME master br0 up
BATCH
  ip -batch - <<BATCH
link set lo up
addr add $NODE_ADDRESS dev eth0
link set eth0 up
BATCH
  if [ -n "$NODE_GATEWAY" ]; then
    ip route add default via "$NODE_GATEWAY"
    echo 1 >/proc/sys/net/ipv4/ip_forward
  fi
}

read_only() { mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"; }

mount_devices() {
  local root=$1 device
  mount -t tmpfs -o mode=755 tmpfs "$root/dev"
  mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
  for device in null zero full random urandom tty fuse net/tun; do
    [ -e "/dev/$device" ] || continue
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
  done
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
  mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
  ln -s pts/ptmx "$root/dev/ptmx"
  ln -s /proc/self/fd "$root/dev/fd"
  ln -s fd/0 "$root/dev/stdin"
  ln -s fd/1 "$root/dev/stdout"
  ln -s fd/2 "$root/dev/stderr"
}

mount_cgroups() {
  local root=$1/sys/fs/cgroup controllers
  if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
    mount -t cgroup2 cgroup2 "$root"
    return
  fi
  mount -t tmpfs -o mode=755 tmpfs "$root"
  while IFS=: read -r _ controllers _; do
    case $controllers in
      name=*) mkdir "$root/${controllers#name=}" && mount -t cgroup -o "none,$controllers" cgroup "$root/${controllers#name=}" ;;
      "") mkdir "$root/unified" && mount -t cgroup2 cgroup2 "$root/unified" ;;
      *) mkdir "$root/$controllers" && mount -t cgroup -o "$controllers" cgroup "$root/$controllers" ;;
    esac
  done </proc/self/cgroup
}

mount_root() {
  local root=$1
  mount -t overlay overlay -o "lowerdir=/,upperdir=$NODE_DIR/upper,workdir=$NODE_DIR/work" "$root"
  mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
  mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
  mount -t proc proc "$root/proc"
  mount -t sysfs -o ro sysfs "$root/sys"
  # No kernel setting of the machine can be changed from here, but those of a
  # network namespace that is the node's own.
  read_only "$root/proc/sys"
  [ ! -e "$root/proc/sysrq-trigger" ] || read_only "$root/proc/sysrq-trigger"
  if [ -n "$LAB_NETNS" ]; then
    mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
    mount -o remount,bind,rw "$root/proc/sys/net"
  fi
  # Without a boot id of its own all nodes and all their boots share one.
  cat /proc/sys/kernel/random/uuid >"$root/run/.boot_id"
  mount --bind "$root/run/.boot_id" "$root/proc/sys/kernel/random/boot_id"
  mount_devices "$root"
  mount_cgroups "$root"
}

# A real file system, for renames and links that an overlay does otherwise.
mount_own() {
  local root=$1 source target
  mkdir -p "$root/var/lib/kari" "$root/run/kari-testbed"
  mount --bind "$NODE_DIR/kari" "$root/var/lib/kari"
  mount -o remount,bind,exec "$root/var/lib/kari"
  mount --bind "$NODE_DIR/credentials" "$root/run/kari-testbed"
  while IFS=$'\t' read -r source target; do
    if [ -d "$source" ]; then mkdir -p "$root$target"; else mkdir -p "$root${target%/*}" && : >"$root$target"; fi
    mount --bind "$source" "$root$target"
    mount -o remount,bind,ro,exec "$root$target"
  done <"$NODE_BINDS"
}

# What a kubelet and a container runtime need of a machine. Their folders are on
# a real file system, as an overlay takes no other overlay's layers, and stay
# over a reboot. Their units are in /run: /etc/systemd/system is Kari's to look after.
prepare_for_kubelet() {
  local root=$1 folder setting
  for folder in containerd kubelet; do
    mkdir -p "$root/var/lib/$folder"
    mount --bind "$NODE_DIR/$folder" "$root/var/lib/$folder"
    mount -o remount,bind,exec,suid,dev "$root/var/lib/$folder"
  done
  ln -s null "$root/dev/kmsg" # it must open; the kernel's own lines are the machine's
  # It insists on these and may not write them: it is shown them, the machine keeps its own.
  for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
    folder=$root/run/.sysctl/${setting%/*}
    mkdir -p "$folder"
    echo "${setting#*=}" >"$root/run/.sysctl/${setting%=*}"
    mount --bind "$root/run/.sysctl/${setting%=*}" "$root/proc/sys/${setting%=*}"
  done
  mkdir -p "$root/run/systemd"
  cp -a "$NODE_DIR/kubelet.conf/units" "$root/run/systemd/system"
}

# A program that was told where its libraries are finds them where they are bound.
add_libraries() {
  [ -s "$NODE_LIBRARIES" ] || return 0
  cat "$NODE_LIBRARIES" >"$1/etc/ld.so.conf.d/00-toolchains.conf"
  chroot "$1" ldconfig
}

# The first boot only: none of the machine's own services, logs and users'
# tables are the node's. What apps enable later is kept by the upper layer.
prepare_system() {
  local root=$1 etc=$1/etc unit generator
  rm -rf "$etc/systemd/system" "$etc/userdb" "$root/var/log/journal"
  mkdir -p "$etc/systemd/system" "$etc/systemd/system-generators" "$root/var/log/journal"
  for unit in $MASKED; do ln -s /dev/null "$etc/systemd/system/$unit"; done
  ln -s /lib/systemd/system/multi-user.target "$etc/systemd/system/default.target"
  for generator in "$root"/usr/lib/systemd/system-generators/*; do
    ln -sf /dev/null "$etc/systemd/system-generators/${generator##*/}"
  done
  : >"$etc/fstab"
  rm -f "$etc/hostname" "$etc/machine-id" "$etc/hosts"
  echo "$NODE_NAME" >"$etc/hostname"
  tr -d - </proc/sys/kernel/random/uuid >"$etc/machine-id"
  printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost\n' "$NODE_NAME" >"$etc/hosts"
  # Users of /etc/userdb have names only by way of this module.
  sed -i -E '/^(passwd|group|shadow):/{/systemd/!s/$/ systemd/}' "$etc/nsswitch.conf"
  if [ -z "$LAB_NETNS" ]; then # it may be a link into the machine's /run
    cat /etc/resolv.conf >"$root/run/.resolv.conf"
    rm -f "$etc/resolv.conf"
    cat "$root/run/.resolv.conf" >"$etc/resolv.conf"
  fi
}

# PID 1 of the new namespaces. Only it enters the cgroups: systemd could not hand
# out controllers while a process of another PID namespace is in its root.
enter() {
  local pid group
  # The machine's /proc is still there: it tells the number that the machine sees.
  read -r pid _ </proc/self/stat
  if [ "$(readlink /proc/self/ns/mnt)" = "$MACHINE_MNT" ]; then
    echo "not in a mount namespace of its own"
    exit 1
  fi
  echo "$pid" >"$NODE_DIR/pid.new"
  mv "$NODE_DIR/pid.new" "$NODE_DIR/pid"
  while read -r group; do echo 0 >"$group/cgroup.procs"; done <"$NODE_DIR/cgroups" # 0 is the writer
  exec unshare --cgroup bash "$0" boot
}

boot() {
  local root=$NODE_DIR/root
  hostname "$NODE_NAME"
  [ -z "$LAB_NETNS" ] || connect_to_lab
  mount_root "$root"
  [ -e "$NODE_DIR/prepared" ] || prepare_system "$root"
  mount_own "$root"
  [ -z "$NODE_GATEWAY" ] || prepare_for_kubelet "$root"
  [ -e "$NODE_DIR/prepared" ] || add_libraries "$root"
  : >"$NODE_DIR/prepared"
  mkdir "$root/run/.old"
  cd "$root"
  pivot_root . run/.old
  umount -l /run/.old
  rmdir /run/.old
  mount --make-rshared / # or LoadCredential= yields nothing
  exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM=dumb \
    container=kari-testbed "KARI_TESTBED=$KARI_TESTBED" \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
}

launch() {
  local network=
  [ -z "$LAB_NETNS" ] || network=--net
  make_cgroups
  MACHINE_MNT=$(readlink /proc/self/ns/mnt)
  export MACHINE_MNT
  exec unshare --mount --uts --ipc --pid $network --fork --kill-child --propagation private bash "$0" enter
}

"$1"
