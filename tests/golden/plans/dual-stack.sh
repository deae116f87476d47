# Needs iproute2, procps, iptables and, for kube-proxy's counters, nfacct.
# netlab does not know what this makes: `ip netns del` removes it.
ip netns add dual-stack:_switch
ip -n dual-stack:_switch link set lo up
ip netns exec dual-stack:_switch sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:_switch sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:_switch sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip netns exec dual-stack:_switch sysctl -q -w net/ipv4/ip_forward=1
ip netns exec dual-stack:_switch sysctl -q -w net/ipv6/conf/all/forwarding=1
ip netns exec dual-stack:_switch sysctl -q -w net/bridge/bridge-nf-call-iptables=0
ip netns exec dual-stack:_switch sysctl -q -w net/bridge/bridge-nf-call-ip6tables=0
ip netns add dual-stack:k8s-slave1
ip -n dual-stack:k8s-slave1 link set lo up
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv4/ip_forward=1
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv6/conf/all/forwarding=1
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv4/conf/all/rp_filter=2
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/bridge/bridge-nf-call-iptables=1
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/bridge/bridge-nf-call-ip6tables=1
ip netns exec dual-stack:k8s-slave1 sysctl -q -w net/ipv4/conf/all/route_localnet=1
ip netns add dual-stack:demo:pod1
ip -n dual-stack:demo:pod1 link set lo up
ip netns exec dual-stack:demo:pod1 sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:demo:pod1 sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:demo:pod1 sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip netns add dual-stack:demo:mysql-85f4f65f99-w6jkj
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj link set lo up
ip netns exec dual-stack:demo:mysql-85f4f65f99-w6jkj sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:demo:mysql-85f4f65f99-w6jkj sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:demo:mysql-85f4f65f99-w6jkj sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip netns add dual-stack:demo:myblog-5c97d79cdb-jn7km
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km link set lo up
ip netns exec dual-stack:demo:myblog-5c97d79cdb-jn7km sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:demo:myblog-5c97d79cdb-jn7km sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:demo:myblog-5c97d79cdb-jn7km sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip netns add dual-stack:k8s-slave2
ip -n dual-stack:k8s-slave2 link set lo up
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv4/ip_forward=1
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv6/conf/all/forwarding=1
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv4/conf/all/rp_filter=2
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/bridge/bridge-nf-call-iptables=1
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/bridge/bridge-nf-call-ip6tables=1
ip netns exec dual-stack:k8s-slave2 sysctl -q -w net/ipv4/conf/all/route_localnet=1
ip netns add dual-stack:demo:myblog-5c97d79cdb-j485f
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f link set lo up
ip netns exec dual-stack:demo:myblog-5c97d79cdb-j485f sysctl -q -w net/ipv6/conf/all/addr_gen_mode=1
ip netns exec dual-stack:demo:myblog-5c97d79cdb-j485f sysctl -q -w net/ipv6/conf/default/accept_ra=0
ip netns exec dual-stack:demo:myblog-5c97d79cdb-j485f sysctl -q -w net/ipv6/conf/all/disable_ipv6=0
ip -n dual-stack:_switch link add br0 mtu 1500 address 0a:58:ac:15:20:01 type bridge
ip -n dual-stack:_switch link set br0 up
ip -n dual-stack:k8s-slave1 link add cbr0 mtu 1430 address 0a:58:0a:f4:01:01 type bridge
ip -n dual-stack:k8s-slave1 link set cbr0 up
ip -n dual-stack:k8s-slave2 link add cbr0 mtu 1430 address 0a:58:0a:f4:02:01 type bridge
ip -n dual-stack:k8s-slave2 link set cbr0 up
ip -n dual-stack:_switch link add k8s-slave1 mtu 1500 type veth peer name eth0 netns dual-stack:k8s-slave1 mtu 1500 address 0a:58:ac:15:20:0b
ip -n dual-stack:_switch link set k8s-slave1 master br0
ip -n dual-stack:_switch link set k8s-slave1 up
ip -n dual-stack:_switch link add k8s-slave2 mtu 1500 type veth peer name eth0 netns dual-stack:k8s-slave2 mtu 1500 address 0a:58:ac:15:20:09
ip -n dual-stack:_switch link set k8s-slave2 master br0
ip -n dual-stack:_switch link set k8s-slave2 up
ip -n dual-stack:k8s-slave1 link add veth59635599 mtu 1430 type veth peer name eth0 netns dual-stack:demo:pod1 mtu 1430 address 0a:58:0a:f4:01:02
ip -n dual-stack:k8s-slave1 link set veth59635599 master cbr0
ip -n dual-stack:k8s-slave1 link set veth59635599 type bridge_slave hairpin on
ip -n dual-stack:k8s-slave1 link set veth59635599 up
ip -n dual-stack:k8s-slave1 link add veth46c4c4d2 mtu 1430 type veth peer name eth0 netns dual-stack:demo:mysql-85f4f65f99-w6jkj mtu 1430 address 0a:58:0a:f4:01:03
ip -n dual-stack:k8s-slave1 link set veth46c4c4d2 master cbr0
ip -n dual-stack:k8s-slave1 link set veth46c4c4d2 type bridge_slave hairpin on
ip -n dual-stack:k8s-slave1 link set veth46c4c4d2 up
ip -n dual-stack:k8s-slave1 link add veth1290bb82 mtu 1430 type veth peer name eth0 netns dual-stack:demo:myblog-5c97d79cdb-jn7km mtu 1430 address 0a:58:0a:f4:01:04
ip -n dual-stack:k8s-slave1 link set veth1290bb82 master cbr0
ip -n dual-stack:k8s-slave1 link set veth1290bb82 type bridge_slave hairpin on
ip -n dual-stack:k8s-slave1 link set veth1290bb82 up
ip -n dual-stack:k8s-slave2 link add veth9470372b mtu 1430 type veth peer name eth0 netns dual-stack:demo:myblog-5c97d79cdb-j485f mtu 1430 address 0a:58:0a:f4:02:05
ip -n dual-stack:k8s-slave2 link set veth9470372b master cbr0
ip -n dual-stack:k8s-slave2 link set veth9470372b type bridge_slave hairpin on
ip -n dual-stack:k8s-slave2 link set veth9470372b up
ip -n dual-stack:k8s-slave1 link set eth0 up
ip -n dual-stack:k8s-slave1 link add flannel.1 mtu 1450 address 0e:cc:d8:b0:3c:c1 type vxlan id 1 local 172.21.32.11 dev eth0 dstport 8472 nolearning
ip -n dual-stack:k8s-slave1 link set flannel.1 up
ip -n dual-stack:k8s-slave1 link add flannel-v6.1 mtu 1430 address 0e:72:1f:3a:f6:17 type vxlan id 1 local fd00:172:21:32::11 dev eth0 dstport 8472 nolearning
ip -n dual-stack:k8s-slave1 link set flannel-v6.1 up
ip -n dual-stack:demo:pod1 link set eth0 up
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj link set eth0 up
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km link set eth0 up
ip -n dual-stack:k8s-slave2 link set eth0 up
ip -n dual-stack:k8s-slave2 link add flannel.1 mtu 1450 address 0e:8e:e7:50:b0:34 type vxlan id 1 local 172.21.32.9 dev eth0 dstport 8472 nolearning
ip -n dual-stack:k8s-slave2 link set flannel.1 up
ip -n dual-stack:k8s-slave2 link add flannel-v6.1 mtu 1430 address 0e:ef:1c:c3:da:73 type vxlan id 1 local fd00:172:21:32::9 dev eth0 dstport 8472 nolearning
ip -n dual-stack:k8s-slave2 link set flannel-v6.1 up
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f link set eth0 up
ip -n dual-stack:_switch address replace 172.21.32.1/24 dev br0
ip -n dual-stack:_switch address replace fd00:172:21:32::1/64 dev br0 nodad
ip -n dual-stack:_switch address replace fe80::858:acff:fe15:2001/64 dev br0 nodad
ip -n dual-stack:k8s-slave1 address replace 172.21.32.11/24 dev eth0
ip -n dual-stack:k8s-slave1 address replace fd00:172:21:32::11/64 dev eth0 nodad
ip -n dual-stack:k8s-slave1 address replace fe80::858:acff:fe15:200b/64 dev eth0 nodad
ip -n dual-stack:k8s-slave1 address replace 10.244.1.0/32 dev flannel.1
ip -n dual-stack:k8s-slave1 address replace fd00:10:244:1::/128 dev flannel-v6.1 nodad
ip -n dual-stack:k8s-slave1 address replace fe80::c72:1fff:fe3a:f617/64 dev flannel-v6.1 nodad
ip -n dual-stack:k8s-slave1 address replace 10.244.1.1/24 dev cbr0
ip -n dual-stack:k8s-slave1 address replace fd00:10:244:1::1/64 dev cbr0 nodad
ip -n dual-stack:k8s-slave1 address replace fe80::858:aff:fef4:101/64 dev cbr0 nodad
ip -n dual-stack:k8s-slave1 neighbour replace 10.244.2.0 lladdr 0e:8e:e7:50:b0:34 dev flannel.1 nud permanent
ip -n dual-stack:k8s-slave1 neighbour replace fd00:10:244:2:: lladdr 0e:ef:1c:c3:da:73 dev flannel-v6.1 nud permanent
bridge -n dual-stack:k8s-slave1 fdb replace 0e:8e:e7:50:b0:34 dev flannel.1 dst 172.21.32.9 self permanent
bridge -n dual-stack:k8s-slave1 fdb replace 0e:ef:1c:c3:da:73 dev flannel-v6.1 dst fd00:172:21:32::9 self permanent
ip -n dual-stack:k8s-slave1 route replace 0.0.0.0/0 via 172.21.32.1 dev eth0
ip -n dual-stack:k8s-slave1 route replace ::/0 via fd00:172:21:32::1 dev eth0
ip -n dual-stack:k8s-slave1 route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink
ip -n dual-stack:k8s-slave1 route replace fd00:10:244:2::/64 via fd00:10:244:2:: dev flannel-v6.1 onlink
ip -n dual-stack:demo:pod1 address replace 10.244.1.2/24 dev eth0
ip -n dual-stack:demo:pod1 address replace fd00:10:244:1::2/64 dev eth0 nodad
ip -n dual-stack:demo:pod1 address replace fe80::858:aff:fef4:102/64 dev eth0 nodad
ip -n dual-stack:demo:pod1 route replace 0.0.0.0/0 via 10.244.1.1 dev eth0
ip -n dual-stack:demo:pod1 route replace ::/0 via fd00:10:244:1::1 dev eth0
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj address replace 10.244.1.3/24 dev eth0
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj address replace fd00:10:244:1::3/64 dev eth0 nodad
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj address replace fe80::858:aff:fef4:103/64 dev eth0 nodad
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj route replace 0.0.0.0/0 via 10.244.1.1 dev eth0
ip -n dual-stack:demo:mysql-85f4f65f99-w6jkj route replace ::/0 via fd00:10:244:1::1 dev eth0
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km address replace 10.244.1.4/24 dev eth0
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km address replace fd00:10:244:1::4/64 dev eth0 nodad
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km address replace fe80::858:aff:fef4:104/64 dev eth0 nodad
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km route replace 0.0.0.0/0 via 10.244.1.1 dev eth0
ip -n dual-stack:demo:myblog-5c97d79cdb-jn7km route replace ::/0 via fd00:10:244:1::1 dev eth0
ip -n dual-stack:k8s-slave2 address replace 172.21.32.9/24 dev eth0
ip -n dual-stack:k8s-slave2 address replace fd00:172:21:32::9/64 dev eth0 nodad
ip -n dual-stack:k8s-slave2 address replace fe80::858:acff:fe15:2009/64 dev eth0 nodad
ip -n dual-stack:k8s-slave2 address replace 10.244.2.0/32 dev flannel.1
ip -n dual-stack:k8s-slave2 address replace fd00:10:244:2::/128 dev flannel-v6.1 nodad
ip -n dual-stack:k8s-slave2 address replace fe80::cef:1cff:fec3:da73/64 dev flannel-v6.1 nodad
ip -n dual-stack:k8s-slave2 address replace 10.244.2.1/24 dev cbr0
ip -n dual-stack:k8s-slave2 address replace fd00:10:244:2::1/64 dev cbr0 nodad
ip -n dual-stack:k8s-slave2 address replace fe80::858:aff:fef4:201/64 dev cbr0 nodad
ip -n dual-stack:k8s-slave2 neighbour replace 10.244.1.0 lladdr 0e:cc:d8:b0:3c:c1 dev flannel.1 nud permanent
ip -n dual-stack:k8s-slave2 neighbour replace fd00:10:244:1:: lladdr 0e:72:1f:3a:f6:17 dev flannel-v6.1 nud permanent
bridge -n dual-stack:k8s-slave2 fdb replace 0e:cc:d8:b0:3c:c1 dev flannel.1 dst 172.21.32.11 self permanent
bridge -n dual-stack:k8s-slave2 fdb replace 0e:72:1f:3a:f6:17 dev flannel-v6.1 dst fd00:172:21:32::11 self permanent
ip -n dual-stack:k8s-slave2 route replace 0.0.0.0/0 via 172.21.32.1 dev eth0
ip -n dual-stack:k8s-slave2 route replace ::/0 via fd00:172:21:32::1 dev eth0
ip -n dual-stack:k8s-slave2 route replace 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink
ip -n dual-stack:k8s-slave2 route replace fd00:10:244:1::/64 via fd00:10:244:1:: dev flannel-v6.1 onlink
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f address replace 10.244.2.5/24 dev eth0
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f address replace fd00:10:244:2::5/64 dev eth0 nodad
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f address replace fe80::858:aff:fef4:205/64 dev eth0 nodad
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f route replace 0.0.0.0/0 via 10.244.2.1 dev eth0
ip -n dual-stack:demo:myblog-5c97d79cdb-j485f route replace ::/0 via fd00:10:244:2::1 dev eth0
