#!/bin/bash
# Process 1 of the guest kernel (see guest.py). The root file system is the host's, live, so everything that may be
# written is covered with memory first; only the exchange directory stays connected to the host.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir /run/exchange
mount --bind "$GUEST_EXCHANGE" /run/exchange
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/shm /dev/pts /dev/net
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts 2>/dev/null
mkdir /run/tmp
# A project that itself lies in a temporary directory must stay visible; what it writes goes to /run/tmp.
for place in /tmp /var/tmp; do
    case "$(cat /run/exchange/directory)/" in
        "$place"/*) ;;
        *) mount -t tmpfs tmpfs "$place" ;;
    esac
done
ip link set lo up

modules=/usr/lib/uml/modules/$(uname -r)/kernel
for module in drivers/net/veth drivers/net/tun drivers/net/ifb net/sched/sch_ingress net/sched/sch_netem net/sched/sch_tbf net/sched/sch_plug net/sched/sch_codel \
    net/sched/cls_u32 net/sched/act_mirred; do
    insmod "$modules/$module.ko" >>/run/exchange/boot 2>&1 || echo "insmod $module failed" >>/run/exchange/boot
done

mapfile -d '' -t environment </run/exchange/environment
mapfile -d '' -t command </run/exchange/command
cd "$(cat /run/exchange/directory)" &&
    touch /run/exchange/started && env -i "${environment[@]}" "${command[@]}" </dev/null >>/run/exchange/output 2>&1
echo $? >/run/exchange/status.part
mv /run/exchange/status.part /run/exchange/status
sync
# Process 1 must not end (that is a kernel panic); this switches the guest off.
echo o >/proc/sysrq-trigger
sleep 60
