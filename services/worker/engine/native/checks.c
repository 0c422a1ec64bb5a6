/* Checksums of weights, one for each panel. They find damage, not malice.
 *
 * They are compared in the first pass that reads a panel, while it is in the cache: comparing them at the load would read all
 * of a model from memory, and the pass that is waited for then reads it again. */
#include "kernels.h"

#define COLUMNS 8
#define STRIPE_BYTES (COLUMNS * 64)
#define ODD_32 ((int32_t)0x9E3779B1u)
#define ODD_64 0x9E3779B185EBCA87ull

static size_t panel_bytes(const rh_linear *linear) {
    const size_t number_bytes = linear->kind == RH_FP32 ? 4 : linear->kind == RH_BF16 ? 2 : 1;
    return (size_t)linear->inputs * RH_PANEL * number_bytes; /* a multiple of 1024: inputs come in groups of 32 */
}

/* Each step can be undone (xor, rotating, multiplying by an odd number), so one changed word always changes the sum; more of
 * them do but for one case in 2^32 and more. */
uint64_t rh_panel_sum(const rh_linear *linear, int panel) {
    const size_t bytes = panel_bytes(linear);
    const char *at = (const char *)linear->packed + panel * bytes, *end = at + bytes;
    const rh_ints odd = i_set(ODD_32);
    rh_ints columns[COLUMNS];
    RH_UNROLL for (int c = 0; c < COLUMNS; c++) columns[c] = i_set(c + 1);
    for (; at < end; at += STRIPE_BYTES)
        RH_UNROLL for (int c = 0; c < COLUMNS; c++)
            columns[c] = i_mul(i_rotate_13(i_xor(columns[c], i_load(at + 64 * c))), odd);
    uint32_t words[COLUMNS * RH_LANES];
    RH_UNROLL for (int c = 0; c < COLUMNS; c++) i_store(words + c * RH_LANES, columns[c]);
    uint64_t sum = bytes;
    for (int word = 0; word < COLUMNS * RH_LANES; word++) sum = (sum ^ words[word]) * ODD_64;
    return sum;
}

/* sums: room for one number for each panel. What Python calls when an image is made. */
void rh_panel_sums(const rh_linear *linear, uint64_t *sums) {
    for (int panel = 0; panel < (linear->outputs + RH_PANEL - 1) / RH_PANEL; panel++)
        sums[panel] = rh_panel_sum(linear, panel);
}
