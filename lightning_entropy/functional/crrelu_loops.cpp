// CRReLU and its gradients, one loop each: every number is read once and written once.
//
// Compiled when it is first needed, by crrelu_compiled.py, for the processor that it then runs on. Plain C++ that
// compilers turn into vector code; no header of torch. Needs IEEE comparisons (so no -ffast-math), since NaN must pass.
//
// "rows": x is (rows, inner), and row r has the parameters of channel r % channels (one channel: one parameter).
// "columns": x is (rows, channels), and column c has the parameters of channel c.
// Sums are taken block by block, in blocks whose borders do not depend on the number of threads, and the blocks are
// added up by the caller in their order: the same bits with one thread and with many.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 4096;      // numbers of a block in "rows"
constexpr int64_t BLOCK_ROWS = 32;   // rows of a block in "columns"
constexpr float FAR_AWAY = 13.2f;    // exp(-z*z/2) is below 2e-38 from here on: taken as 0
constexpr float MAGIC = 12583039.0f; // 1.5 * 2^23 + 127: added, it rounds to an integer n, and n + 127 is in the bits
constexpr float HALF_LOG2E = 0.721347520444481703680f;

inline uint32_t bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}

inline float from_bits(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// bfloat16 is the upper half of a float; stored rounded to nearest, ties to even. A NaN stays one, since those that
// come in are of bfloat16 or from known(), and have room for the carry.
inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) { return from_bits(uint32_t(*p) << 16); }
inline void store(float *p, float v) { *p = v; }
inline void store(uint16_t *p, float v) {
  uint32_t u = bits(v);
  *p = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline float known(float v) { return v != v ? from_bits(0x7fc00000u) : v; }

// exp(-t*t/2) for |t| < FAR_AWAY: 2^n from the exponent bits times 2^r, |r| <= 1/2, by a polynomial that is off by
// 2e-9 at most and exact at 0.
inline float gaussian(float t) {
  float square = t * t;
  float shifted = MAGIC - square * HALF_LOG2E;
  float r = -square * HALF_LOG2E - (shifted - MAGIC);
  float p = 0x1.41d334p-13f;
  p = p * r + 0x1.5f456ap-10f;
  p = p * r + 0x1.3b2dbcp-7f;
  p = p * r + 0x1.c6aed4p-5f;
  p = p * r + 0x1.ebfbdap-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  return p * from_bits(bits(shifted) << 23);
}

inline bool far_away(float z) { return std::fabs(z) >= FAR_AWAY; } // false for NaN, which goes on as NaN

// PLAIN: mu = 0 and sigma = 1, which are then not read.
template <bool PLAIN> inline float standardized(float x, float mu, float inverse) {
  return PLAIN ? x : (x - mu) * inverse;
}

template <bool PLAIN> inline float value(float x, float eps, float mu, float sigma, float inverse) {
  float z = standardized<PLAIN>(x, mu, inverse);
  float t = far_away(z) ? 0.0f : z;
  float bump = t * gaussian(t);
  return (x < 0.0f ? 0.0f : x) + eps * (PLAIN ? bump : sigma * bump);
}

// The gradient of x; `term` is what this number adds to the gradient of eps.
template <bool PLAIN>
inline float slope(float x, float g, float eps, float mu, float sigma, float inverse, float &term) {
  float z = standardized<PLAIN>(x, mu, inverse);
  float t = far_away(z) ? 0.0f : z;
  float weighted = far_away(z) ? 0.0f : gaussian(t) * g;
  float product = t * weighted;
  term = PLAIN ? product : sigma * product;
  return (x <= 0.0f ? 0.0f : g) + eps * (weighted - t * product);
}

// `parameters` holds eps and, unless PLAIN, mu, sigma and 1 / sigma of all channels, one kind after the other.

template <typename T, bool PLAIN>
void forward_rows(const T *x, T *y, const float *parameters, int64_t rows, int64_t inner, int64_t channels,
                  int threads) {
  const int64_t blocks = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < rows * blocks; k++) {
    const int64_t row = k / blocks, first = (k % blocks) * BLOCK;
    const int64_t n = inner - first < BLOCK ? inner - first : BLOCK;
    const float *own = parameters + row % channels;
    const float eps = known(own[0]), mu = PLAIN ? 0.0f : known(own[channels]);
    const float sigma = PLAIN ? 1.0f : known(own[2 * channels]), inverse = PLAIN ? 1.0f : known(own[3 * channels]);
    const T *__restrict from = x + row * inner + first;
    T *__restrict to = y + row * inner + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(to + i, value<PLAIN>(load(from + i), eps, mu, sigma, inverse));
  }
}

template <typename T, bool PLAIN>
void backward_rows(const T *x, const T *g, T *gx, float *sums, const float *parameters, int64_t rows, int64_t inner,
                   int64_t channels, int threads) {
  const int64_t blocks = (inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < rows * blocks; k++) {
    const int64_t row = k / blocks, first = (k % blocks) * BLOCK;
    const int64_t n = inner - first < BLOCK ? inner - first : BLOCK;
    const float *own = parameters + row % channels;
    const float eps = known(own[0]), mu = PLAIN ? 0.0f : known(own[channels]);
    const float sigma = PLAIN ? 1.0f : known(own[2 * channels]), inverse = PLAIN ? 1.0f : known(own[3 * channels]);
    const T *__restrict from = x + row * inner + first;
    const T *__restrict given = g + row * inner + first;
    T *__restrict to = gx + row * inner + first;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
      float term;
      store(to + i, slope<PLAIN>(load(from + i), load(given + i), eps, mu, sigma, inverse, term));
      sum += term;
    }
    sums[k] = sum;
  }
}

template <typename T, bool PLAIN>
void forward_columns(const T *x, T *y, const float *parameters, int64_t rows, int64_t channels, int threads) {
  const float *__restrict eps = parameters, *__restrict mu = PLAIN ? parameters : parameters + channels;
  const float *__restrict sigma = PLAIN ? parameters : parameters + 2 * channels;
  const float *__restrict inverse = PLAIN ? parameters : parameters + 3 * channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; row++) {
    const T *__restrict from = x + row * channels;
    T *__restrict to = y + row * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++)
      store(to + c, value<PLAIN>(load(from + c), known(eps[c]), known(mu[c]), known(sigma[c]), known(inverse[c])));
  }
}

template <typename T, bool PLAIN>
void backward_columns(const T *x, const T *g, T *gx, float *sums, const float *parameters, int64_t rows,
                      int64_t channels, int threads) {
  const float *__restrict eps = parameters, *__restrict mu = PLAIN ? parameters : parameters + channels;
  const float *__restrict sigma = PLAIN ? parameters : parameters + 2 * channels;
  const float *__restrict inverse = PLAIN ? parameters : parameters + 3 * channels;
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    float *__restrict sum = sums + k * channels;
    for (int64_t c = 0; c < channels; c++) sum[c] = 0.0f;
    const int64_t last = (k + 1) * BLOCK_ROWS < rows ? (k + 1) * BLOCK_ROWS : rows;
    for (int64_t row = k * BLOCK_ROWS; row < last; row++) {
      const T *__restrict from = x + row * channels;
      const T *__restrict given = g + row * channels;
      T *__restrict to = gx + row * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        float term;
        store(to + c, slope<PLAIN>(load(from + c), load(given + c), known(eps[c]), known(mu[c]), known(sigma[c]),
                                   known(inverse[c]), term));
        sum[c] += term;
      }
    }
  }
}

template <typename T>
void forward(const T *x, T *y, const float *parameters, int64_t rows, int64_t channels, int64_t inner, int columns,
             int plain, int threads) {
  if (columns) {
    if (plain) forward_columns<T, true>(x, y, parameters, rows, channels, threads);
    else forward_columns<T, false>(x, y, parameters, rows, channels, threads);
  } else {
    if (plain) forward_rows<T, true>(x, y, parameters, rows, inner, channels, threads);
    else forward_rows<T, false>(x, y, parameters, rows, inner, channels, threads);
  }
}

template <typename T>
void backward(const T *x, const T *g, T *gx, float *sums, const float *parameters, int64_t rows, int64_t channels,
              int64_t inner, int columns, int plain, int threads) {
  if (columns) {
    if (plain) backward_columns<T, true>(x, g, gx, sums, parameters, rows, channels, threads);
    else backward_columns<T, false>(x, g, gx, sums, parameters, rows, channels, threads);
  } else {
    if (plain) backward_rows<T, true>(x, g, gx, sums, parameters, rows, inner, channels, threads);
    else backward_rows<T, false>(x, g, gx, sums, parameters, rows, inner, channels, threads);
  }
}

} // namespace

extern "C" {

int64_t crrelu_block() { return BLOCK; }
int64_t crrelu_block_rows() { return BLOCK_ROWS; }

void crrelu_forward_float32(const float *x, float *y, const float *parameters, int64_t rows, int64_t channels,
                            int64_t inner, int columns, int plain, int threads) {
  forward(x, y, parameters, rows, channels, inner, columns, plain, threads);
}

void crrelu_forward_bfloat16(const uint16_t *x, uint16_t *y, const float *parameters, int64_t rows, int64_t channels,
                             int64_t inner, int columns, int plain, int threads) {
  forward(x, y, parameters, rows, channels, inner, columns, plain, threads);
}

void crrelu_backward_float32(const float *x, const float *g, float *gx, float *sums, const float *parameters,
                             int64_t rows, int64_t channels, int64_t inner, int columns, int plain, int threads) {
  backward(x, g, gx, sums, parameters, rows, channels, inner, columns, plain, threads);
}

void crrelu_backward_bfloat16(const uint16_t *x, const uint16_t *g, uint16_t *gx, float *sums,
                              const float *parameters, int64_t rows, int64_t channels, int64_t inner, int columns,
                              int plain, int threads) {
  backward(x, g, gx, sums, parameters, rows, channels, inner, columns, plain, threads);
}
}
