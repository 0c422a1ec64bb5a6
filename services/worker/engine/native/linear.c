/* Products of packed weights and rows.
 *
 * A row's sums are taken in one order whatever rows stand beside it, so neighbours change no bit of it; how rows are cut
 * into tiles decides speed only. A tile is up to 8 rows by one panel of 32 outputs: its sums fill half of the registers, the
 * rest holds weights on their way. While a tile is computed, the weights that come next are fetched. */
#include "kernels.h"

#define TILE_ROWS 8
/* Inputs worked off before the next tile of rows: a panel of that depth stays in the second-level cache. */
#define DEPTH 2048
#define HALVES 2 /* vectors of a panel */

typedef struct {
    const rh_linear *linear;
    const rh_rows *x;
    const float *residual;
    float *y;
    int y_stride;
} product;

/* One tile's place: its rows, its panel, and inputs [from, to). ahead: what to fetch meanwhile, two lines a step: at
 * `ahead` and `ahead_gap` further. */
typedef struct {
    int row;
    int panel;
    int from;
    int to;
    const char *weights;
    const char *ahead;
    size_t ahead_gap;
} tile_place;

RH_INLINE __mmask16 outputs_mask(const rh_linear *linear, int output) {
    const int left = linear->outputs - output;
    return left >= 16 ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* Sums so far lie in y between two depths. */
RH_INLINE __m512 begin(const product *p, const tile_place *at, int r, int half) {
    if (at->from == 0) return _mm512_setzero_ps();
    const int output = at->panel * RH_PANEL + 16 * half;
    return _mm512_maskz_loadu_ps(outputs_mask(p->linear, output), p->y + (size_t)(at->row + r) * p->y_stride + output);
}

/* The last depth adds bias and residual. */
RH_INLINE void finish(const product *p, const tile_place *at, int r, int half, __m512 sum) {
    const rh_linear *linear = p->linear;
    const int output = at->panel * RH_PANEL + 16 * half;
    const __mmask16 mask = outputs_mask(linear, output);
    const size_t place = (size_t)(at->row + r) * p->y_stride + output;
    if (at->to == linear->inputs) {
        if (linear->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, linear->bias + output));
        if (p->residual) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, p->residual + place));
    }
    _mm512_mask_storeu_ps(p->y + place, mask, sum);
}

RH_INLINE const char *fetch(const char *ahead, size_t gap) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + gap, _MM_HINT_T1);
    return ahead + 64;
}

#define FOR_SUMS                                \
    RH_UNROLL for (int r = 0; r < rows; r++)    \
        RH_UNROLL for (int h = 0; h < HALVES; h++)

RH_INLINE void tile_fp32(const product *p, const tile_place *at, const int rows) {
    const size_t inputs = p->linear->inputs;
    const float *w = (const float *)at->weights;
    const float *x = (const float *)p->x->data + at->row * inputs;
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][HALVES];
    FOR_SUMS sums[r][h] = begin(p, at, r, h);
    for (int k = at->from; k < at->to; k++, w += RH_PANEL) {
        const __m512 low = _mm512_loadu_ps(w), high = _mm512_loadu_ps(w + 16);
        ahead = fetch(ahead, at->ahead_gap);
        RH_UNROLL for (int r = 0; r < rows; r++) {
            const __m512 input = _mm512_set1_ps(x[r * inputs + k]);
            sums[r][0] = _mm512_fmadd_ps(low, input, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(high, input, sums[r][1]);
        }
    }
    FOR_SUMS finish(p, at, r, h, sums[r][h]);
}

/* bf16 weights are the upper halves of fp32 numbers: two operations make a vector of pairs into two vectors of fp32.
 * The processor's own bf16 products round the inputs to 8 bits, and were half as fast on the machine tried. */
RH_INLINE void tile_bf16(const product *p, const tile_place *at, const int rows) {
    const size_t inputs = p->linear->inputs;
    const uint16_t *w = (const uint16_t *)at->weights;
    const float *x = (const float *)p->x->data + at->row * inputs;
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][HALVES];
    FOR_SUMS sums[r][h] = begin(p, at, r, h);
    for (int k = at->from; k < at->to; k += 2, w += 2 * RH_PANEL) {
        const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 32);
        const __m512 low_even = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
        const __m512 low_odd = _mm512_castsi512_ps(_mm512_and_si512(low, upper));
        const __m512 high_even = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
        const __m512 high_odd = _mm512_castsi512_ps(_mm512_and_si512(high, upper));
        ahead = fetch(ahead, at->ahead_gap);
        RH_UNROLL for (int r = 0; r < rows; r++) {
            const __m512 first = _mm512_set1_ps(x[r * inputs + k]), second = _mm512_set1_ps(x[r * inputs + k + 1]);
            sums[r][0] = _mm512_fmadd_ps(low_even, first, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(high_even, first, sums[r][1]);
            sums[r][0] = _mm512_fmadd_ps(low_odd, second, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(high_odd, second, sums[r][1]);
        }
    }
    FOR_SUMS finish(p, at, r, h, sums[r][h]);
}

/* 16 bf16 numbers as fp32. */
RH_INLINE __m512 widen(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

RH_INLINE void tile_int8(const product *p, const tile_place *at, const int rows) {
    const size_t inputs = p->linear->inputs, groups = inputs / RH_GROUP;
    const uint8_t *w = (const uint8_t *)at->weights;
    const int8_t *x = (const int8_t *)p->x->data + at->row * inputs + at->from;
    const float *scales = p->x->scales + at->row * groups;
    const int32_t *offsets = p->x->offsets + at->row * groups;
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][HALVES];
    FOR_SUMS sums[r][h] = begin(p, at, r, h);
    for (int group = at->from / RH_GROUP; group < at->to / RH_GROUP; group++, x += RH_GROUP) {
        __m512i counts[TILE_ROWS][HALVES];
        FOR_SUMS counts[r][h] = _mm512_set1_epi32(offsets[r * groups + group]);
        for (int quad = 0; quad < RH_GROUP; quad += 4, w += 4 * RH_PANEL) {
            const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
            ahead = fetch(ahead, at->ahead_gap);
            RH_UNROLL for (int r = 0; r < rows; r++) {
                const __m512i input = _mm512_set1_epi32(*(const int32_t *)(x + r * inputs + quad));
                counts[r][0] = _mm512_dpbusd_epi32(counts[r][0], low, input);
                counts[r][1] = _mm512_dpbusd_epi32(counts[r][1], high, input);
            }
        }
        const uint16_t *weight_scales = p->linear->scales + (at->panel * groups + group) * RH_PANEL;
        const __m512 low_scale = widen(weight_scales), high_scale = widen(weight_scales + 16);
        RH_UNROLL for (int r = 0; r < rows; r++) {
            const __m512 scale = _mm512_set1_ps(scales[r * groups + group]);
            sums[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(counts[r][0]), _mm512_mul_ps(scale, low_scale), sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(counts[r][1]), _mm512_mul_ps(scale, high_scale), sums[r][1]);
        }
    }
    FOR_SUMS finish(p, at, r, h, sums[r][h]);
}

/* One function for each number of rows: the compiler keeps a tile's sums in registers only if it knows it. */
typedef void (*tile_function)(const product *, const tile_place *);
#define TILE(kind, rows) \
    static void kind##_##rows(const product *p, const tile_place *at) { tile_##kind(p, at, rows); }
#define TILES(kind)                                                        \
    TILE(kind, 1) TILE(kind, 2) TILE(kind, 3) TILE(kind, 4)                \
    TILE(kind, 5) TILE(kind, 6) TILE(kind, 7) TILE(kind, 8)
#define NAMES(kind) {kind##_1, kind##_2, kind##_3, kind##_4, kind##_5, kind##_6, kind##_7, kind##_8}
TILES(fp32) TILES(bf16) TILES(int8)
static const tile_function TILE_FUNCTIONS[3][TILE_ROWS] = {NAMES(fp32), NAMES(bf16), NAMES(int8)};

void rh_multiply_panels(const rh_linear *linear, const rh_rows *x, int rows, int first_panel, int last_panel,
                        const float *residual, int y_stride, float *y) {
    const product p = {linear, x, residual, y, y_stride};
    const size_t weight_bytes = linear->kind == RH_FP32 ? 4 : linear->kind == RH_BF16 ? 2 : 1;
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int panel = first_panel; panel < last_panel; panel++) {
        const char *weights = (const char *)linear->packed + (size_t)panel * linear->inputs * RH_PANEL * weight_bytes;
        for (int from = 0; from < linear->inputs; from += DEPTH) {
            const int to = from + DEPTH < linear->inputs ? from + DEPTH : linear->inputs;
            const size_t bytes = (size_t)(to - from) * RH_PANEL * weight_bytes, half = bytes / 128 * 64;
            int row = 0;
            for (int tile = 0; tile < tiles; tile++) {
                /* Evenly: 9 rows are 5 and 4, not 8 and 1. */
                const int count = (rows - row + tiles - tile - 1) / (tiles - tile);
                /* A single tile fetches both halves of what follows; of several the first two fetch one each. */
                const char *ahead = weights + (tile < 2 ? bytes + (tile ? half : 0) : 0);
                const tile_place at = {row, panel, from, to, weights, ahead, tiles == 1 ? half : 0};
                TILE_FUNCTIONS[linear->kind][count - 1](&p, &at);
                row += count;
            }
            weights += bytes;
        }
    }
}
