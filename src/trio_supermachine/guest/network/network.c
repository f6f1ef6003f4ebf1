#include "network/network.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "network/datagrams.h"
#include "network/egress.h"
#include "network/hooks.h"
#include "network/lo.h"
#include "system/newfile.h"

/* Resolver: an address that no machine has, for which the host itself answers. */
#define RESOLVER "nameserver 192.0.0.1\n"
#define RESOLV_CONF "/etc/resolv.conf"

/* Write a new file, also in the place of a symbolic link: nothing in the guest keeps that up to
 * date. */
static void name_resolver(void) {
    struct new_file file;
    mkdir("/etc", 0755);
    if (new_file_open(&file, RESOLV_CONF, 0644) ||
        new_file_write(&file, (const uint8_t *)RESOLVER, sizeof RESOLVER - 1) ||
        new_file_publish(&file, 0, 0))
        say(RESOLV_CONF ": %s", strerror(errno));
}

void network_open(const struct carrier *carrier) {
    bool ip6;
    if (!lo_configure(&ip6)) return;
    if (!egress_open(carrier, ip6) || !datagrams_open(ip6)) {
        say("no connections to the outside: sockets: %s", strerror(errno));
        return;
    }
    if (hooks_attach()) name_resolver();
}
