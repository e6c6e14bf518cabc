// AMX's instructions in plain C++, for csrc/matmul_amx.h where FASTGPT_EMULATE_AMX is defined: the same tiles, and the
// sums in the order that Intel's manual gives: even and odd k by themselves, and then all of it to the tile. With it,
// the kernels for AMX run wherever AVX-512 does.

struct AmxInstructions {
    struct Tile {
        alignas(64) char row[16][64];
    };
    static FASTGPT_INLINE Tile& tile(int i) {
        static thread_local Tile tiles[8];
        return tiles[i];
    }

    static void begin() {
        for (int i = 0; i < 8; i++) memset(&tile(i), 0xFF, sizeof(Tile)); // NaN: what was never loaded shows
    }
    static void end() {}

    template <int TILE> static void tilezero() { memset(&tile(TILE), 0, sizeof(Tile)); }
    template <int TILE> static void tileloadd(const void* rows, int64_t stride) {
        for (int i = 0; i < 16; i++) memcpy(tile(TILE).row[i], static_cast<const char*>(rows) + i * stride, 64);
    }
    template <int TILE> static void tilestored(void* rows, int64_t stride) {
        for (int i = 0; i < 16; i++) memcpy(static_cast<char*>(rows) + i * stride, tile(TILE).row[i], 64);
    }
    template <int SUMS, int A, int B> static FASTGPT_NOINLINE void tdpbf16ps() {
        float sums[16][16];
        memcpy(sums, &tile(SUMS), sizeof sums);
        for (int m = 0; m < 16; m++) {
            float products[2][16] = {};
            for (int k = 0; k < 32; k++) {
                const float a = bfloat16(tile(A).row[m] + 2 * k);
                for (int n = 0; n < 16; n++) products[k % 2][n] += a * bfloat16(tile(B).row[k / 2] + 4 * n + k % 2 * 2);
            }
            for (int n = 0; n < 16; n++) sums[m][n] += products[0][n] + products[1][n];
        }
        memcpy(&tile(SUMS), sums, sizeof sums);
    }

  private:
    static FASTGPT_INLINE float bfloat16(const char* at) { // subnormals are 0 to the instruction
        uint16_t half;
        memcpy(&half, at, 2);
        const uint32_t bits = half & 0x7F80 ? uint32_t(half) << 16 : 0;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
};
