#!/bin/sh
# Installs or removes lungwatch as a service of systemd; see systemd/README.md.
#
#     systemd/install.sh install | uninstall
#
# From the environment:
#     DESTDIR  root of the tree that is installed into; empty for this machine
#     PYTHON   the interpreter of the new environment (python3)
#     WHEEL    a wheel to install; built from this source tree if not given
#     EXTRAS   of the package, separated by commas: pacs, postgres
#     PURGE    1: `uninstall` removes data, secrets and user, too
#     PIP_ARGS further arguments of pip: --no-index --find-links DIR
set -eu

DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-python3}
WHEEL=${WHEEL:-}
EXTRAS=${EXTRAS:-}
PURGE=${PURGE:-0}
PIP_ARGS=${PIP_ARGS:-}

here=$(cd "$(dirname "$0")" && pwd)
source=$(dirname "$here")
prefix=/opt/lungwatch
state=/var/lib/lungwatch
units=/etc/systemd/system
names="lungwatch.service lungwatch-retention.service lungwatch-retention.timer
    lungwatch-backup.service lungwatch-backup.timer
    lungwatch-query.socket lungwatch-query@.service"

say() { echo "lungwatch: $*"; }
fail() { echo "lungwatch: $*" >&2; exit 1; }
is_running() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

check() {
    if [ -z "$DESTDIR" ] && [ "$(id -u)" != 0 ]; then
        fail "needs root's rights, or DESTDIR"
    fi
}

make_user() {
    install -D -m 0644 "$here/lungwatch.sysusers" "$DESTDIR/usr/lib/sysusers.d/lungwatch.conf"
    if [ -n "$DESTDIR" ]; then
        return  # made where the tree ends up, at the next boot or by systemd-sysusers
    fi
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers lungwatch.conf
    else
        for group in lungwatch-drop lungwatch-read; do
            getent group "$group" >/dev/null || groupadd --system "$group"
        done
        id lungwatch >/dev/null 2>&1 || useradd --system --user-group --home-dir "$state" \
            --shell /usr/sbin/nologin lungwatch
        usermod -a -G lungwatch-drop lungwatch
    fi
    # Droppers of an earlier installation are members of the service's own group.
    for member in $(getent group lungwatch | cut -d: -f4 | tr , ' '); do
        usermod -a -G lungwatch-drop "$member"
        gpasswd --delete "$member" lungwatch >/dev/null
    done
}

make_environment() {
    venv=$DESTDIR$prefix/.venv
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "needs Python 3.11 or newer: PYTHON=python3.x"
    base=$("$PYTHON" -c 'import sys; print(sys.base_prefix)')
    case $base/ in
    # Hidden from the service by ProtectHome= and PrivateTmp=.
    /root/* | /home/* | /run/user/* | /tmp/* | /var/tmp/*)
        fail "the service cannot see the Python in $base: PYTHON=/usr/bin/python3"
        ;;
    esac
    install -d -m 0755 "$DESTDIR$prefix" "$DESTDIR$prefix/share"
    [ -x "$venv/bin/pip" ] || "$PYTHON" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
    if [ -z "$WHEEL" ]; then
        say "building the wheel"
        # A copy: what a build leaves behind does not belong into the source tree.
        mkdir "$work/source"
        (cd "$source" && tar cf - LICENSE NOTICE README.md pyproject.toml \
            core cli daemon db export models training) | (cd "$work/source" && tar xf -)
        # shellcheck disable=SC2086 # several words
        $pip wheel $PIP_ARGS --no-deps --wheel-dir "$work" "$work/source"
        WHEEL=$(ls "$work"/lungwatch-*.whl)
    fi
    say "installing $(basename "$WHEEL") into $prefix"
    # Found and fetched before the old version is stopped; a running one must not see its
    # own files change, since it starts processes from them.
    # shellcheck disable=SC2086
    $pip install $PIP_ARGS --dry-run "$WHEEL${EXTRAS:+[$EXTRAS]}"
    if is_running && systemctl --quiet is-active lungwatch.service; then
        systemctl stop lungwatch.service
    fi
    # The same version may come with other contents; what it needs is only added to.
    # shellcheck disable=SC2086
    $pip install $PIP_ARGS "$WHEEL${EXTRAS:+[$EXTRAS]}"
    # shellcheck disable=SC2086
    $pip install $PIP_ARGS --no-deps --force-reinstall "$WHEEL"
    if [ -n "$DESTDIR" ]; then
        # The commands are to find their interpreter where the tree ends up.
        grep -rlI "^#!$DESTDIR" "$venv/bin" | xargs -r sed -i "1s|^#!$DESTDIR|#!|"
    fi
    install -m 0644 "$source/README.md" "$source/LICENSE" "$source/NOTICE" "$DESTDIR$prefix/share"
    install -d -m 0755 "$DESTDIR/usr/local/bin"
    ln -sfn "$prefix/.venv/bin/lungwatch" "$DESTDIR/usr/local/bin/lungwatch"
}

make_folders() {
    # Others pass through to the drop folder; all beside it is closed.
    install -d -m 0711 "$DESTDIR$state"
    install -d -m 0750 "$DESTDIR/etc/lungwatch"
    # Droppers may add files, and neither list nor remove what others dropped.
    [ -d "$DESTDIR$state/incoming" ] || mkdir "$DESTDIR$state/incoming"
    chmod 3730 "$DESTDIR$state/incoming"
    if [ -z "$DESTDIR" ]; then
        chown lungwatch:lungwatch "$state"
        chown lungwatch:lungwatch-drop "$state/incoming"
        chmod 3730 "$state/incoming"  # chown may take the set-group-ID bit away
        chmod 0700 /etc/lungwatch  # secrets, which systemd reads for the service
    fi
}

make_units() {
    for name in $names; do
        install -D -m 0644 "$here/$name" "$DESTDIR$units/$name"
    done
    install -m 0644 "$here/lungwatch-network.conf" "$DESTDIR$prefix/share"
}

start() {
    is_running || return 0
    systemctl daemon-reload
    systemctl enable lungwatch.service lungwatch-retention.timer lungwatch-backup.timer \
        lungwatch-query.socket
    systemctl restart lungwatch.service
    systemctl start lungwatch-retention.timer lungwatch-backup.timer lungwatch-query.socket
}

stop() {
    is_running || return 0
    for name in $names; do
        if systemctl cat "$name" >/dev/null 2>&1; then
            systemctl disable --now "$name" 2>/dev/null || systemctl stop "$name"
        fi
    done
}

case ${1:-} in
install)
    check
    make_user
    make_environment
    make_folders
    make_units
    start
    say "installed; put X-rays into $state/incoming"
    ;;
uninstall)
    check
    stop
    for name in $names; do
        rm -f "$DESTDIR$units/$name"
    done
    rm -rf "$DESTDIR$prefix"
    rm -f "$DESTDIR/usr/local/bin/lungwatch" "$DESTDIR/usr/lib/sysusers.d/lungwatch.conf"
    if is_running; then systemctl daemon-reload; fi
    if [ "$PURGE" = 1 ]; then
        rm -rf "$DESTDIR$state" "$DESTDIR/etc/lungwatch" "$DESTDIR$units/lungwatch.service.d"
        if [ -z "$DESTDIR" ] && id lungwatch >/dev/null 2>&1; then
            userdel lungwatch
            for group in lungwatch-drop lungwatch-read; do
                if getent group "$group" >/dev/null; then groupdel "$group"; fi
            done
        fi
        say "removed, with all data"
    else
        say "removed; the data stays in $state (PURGE=1 removes it)"
    fi
    ;;
*)
    fail "usage: $0 install|uninstall"
    ;;
esac
