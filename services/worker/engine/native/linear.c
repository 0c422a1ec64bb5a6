/* Products of packed weights and rows.
 *
 * A row's sums are taken in one order whatever rows stand beside it, so neighbours change no bit of it; how rows are cut
 * into tiles decides speed only. A tile is a few rows by one panel of 32 outputs or half of it, so that its sums stay in
 * registers. While a tile is computed, the weights that come next are fetched. */
#include "kernels.h"

/* Inputs worked off before the next tile of rows: a panel of that depth stays in the second-level cache. */
#define DEPTH 2048
#define LINE_BYTES 64

typedef struct {
    const rh_linear *linear;
    const rh_rows *x;
    const float *residual;
    float *y;
    int y_stride;
} product;

/* One tile's place: its rows, its panel and which half of it, if not both, and inputs [from, to). weights: of the panel, from `from`
 * on. ahead: what to fetch meanwhile, a line for each half in each step: at `ahead` and `ahead_gap` further. */
typedef struct {
    int row;
    int panel;
    int half;
    int from;
    int to;
    const char *weights;
    const char *ahead;
    size_t ahead_gap;
} tile_place;

RH_INLINE int first_output(const tile_place *at, const int halves, int h) {
    return at->panel * RH_PANEL + RH_LANES * (halves == 2 ? h : at->half);
}

/* Sums so far lie in y between two depths. */
RH_INLINE rh_vec begin(const product *p, const tile_place *at, const int halves, int r, int h) {
    if (at->from == 0) return v_zero();
    const int output = first_output(at, halves, h);
    return v_load_part(v_first(p->linear->outputs - output), p->y + (size_t)(at->row + r) * p->y_stride + output);
}

/* The last depth adds bias and residual. */
RH_INLINE void finish(const product *p, const tile_place *at, const int halves, int r, int h, rh_vec sum) {
    const rh_linear *linear = p->linear;
    const int output = first_output(at, halves, h);
    const rh_mask mask = v_first(linear->outputs - output);
    const size_t place = (size_t)(at->row + r) * p->y_stride + output;
    if (at->to == linear->inputs) {
        if (linear->bias) sum = v_add(sum, v_load_part(mask, linear->bias + output));
        if (p->residual) sum = v_add(sum, v_load_part(mask, p->residual + place));
    }
    v_store_part(p->y + place, mask, sum);
}

RH_INLINE const char *fetch(const char *ahead, size_t gap, const int halves) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    if (halves == 2) _mm_prefetch(ahead + gap, _MM_HINT_T1);
    return ahead + LINE_BYTES;
}

#define FOR_ROWS RH_UNROLL for (int r = 0; r < rows; r++)
#define FOR_HALVES RH_UNROLL for (int h = 0; h < halves; h++)
#define FOR_SUMS FOR_ROWS FOR_HALVES

#ifdef __AVX512F__
#include "tiles_avx512.h"
#else
#include "tiles_avx2.h"
#endif

/* One function for each number of rows: the compiler keeps a tile's sums in registers only if it knows it. */
typedef void (*tile_function)(const product *, const tile_place *);
#define TILE(kind, rows) \
    static void kind##_##rows(const product *p, const tile_place *at) { tile_##kind(p, at, rows, HALVES_##kind(rows)); }
#define NAME(kind, rows) kind##_##rows,
#define HALVES(kind, rows) HALVES_##kind(rows),
EACH_COUNT(TILE, fp32) EACH_COUNT(TILE, bf16) EACH_COUNT(TILE, int8)
static const tile_function TILE_FUNCTIONS[3][TILE_ROWS] = {
    {EACH_COUNT(NAME, fp32)}, {EACH_COUNT(NAME, bf16)}, {EACH_COUNT(NAME, int8)}};
static const int TILE_HALVES[3][TILE_ROWS] = {
    {EACH_COUNT(HALVES, fp32)}, {EACH_COUNT(HALVES, bf16)}, {EACH_COUNT(HALVES, int8)}};

void rh_multiply_panels(const rh_linear *linear, const rh_rows *x, int rows, int first_panel, int last_panel,
                        const float *residual, int y_stride, float *y) {
    const product p = {linear, x, residual, y, y_stride};
    const size_t weight_bytes = linear->kind == RH_FP32 ? 4 : linear->kind == RH_BF16 ? 2 : 1;
    const int tiles = (rows + MOST_ROWS[linear->kind] - 1) / MOST_ROWS[linear->kind];
    for (int panel = first_panel; panel < last_panel; panel++) {
        const char *weights = (const char *)linear->packed + (size_t)panel * linear->inputs * RH_PANEL * weight_bytes;
        for (int from = 0; from < linear->inputs; from += DEPTH) {
            const int to = from + DEPTH < linear->inputs ? from + DEPTH : linear->inputs;
            const size_t bytes = (size_t)(to - from) * RH_PANEL * weight_bytes, half = bytes / 128 * LINE_BYTES;
            int row = 0;
            /* Tiles, or halves of them, so far: the first two fetch a half each of what follows, or one fetches both. */
            int turn = 0;
            for (int tile = 0; tile < tiles; tile++) {
                /* Evenly: 9 rows are 5 and 4, not 8 and 1. */
                const int count = (rows - row + tiles - tile - 1) / (tiles - tile);
                const int halves = TILE_HALVES[linear->kind][count - 1];
                for (int h = 0; h < 2; h += halves, turn++) {
                    const char *ahead = weights + (turn < 2 ? bytes + (turn ? half : 0) : 0);
                    const size_t gap = tiles == 1 ? half : 0;
                    const tile_place at = {row, panel, h, from, to, weights, ahead, gap};
                    TILE_FUNCTIONS[linear->kind][count - 1](&p, &at);
                }
                row += count;
            }
            weights += bytes;
        }
    }
}
